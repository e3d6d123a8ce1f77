"""Upload a pipeline, a VAE, a checkpoint or photos to the Hub."""

import glob
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.columns import with_bytes
from corel_diffusers.data.photos import load_photos
from corel_diffusers.files import UserError, explain_full_disk, first_line, read_json
from corel_diffusers.hub.cards import dataset_card, write_card, write_own
from corel_diffusers.sampling.pipelines import has_guide
from corel_diffusers.saved_models import ENTRY_FILES


def model_files(folder: str) -> tuple[str, ...]:
    """Return the patterns of the files that a model of diffusers consists of. No pickle is one of them."""
    names = ("config.json", "*.safetensors", "*.safetensors.index.json")
    return tuple(f"{folder}/{name}" for name in names)


PIPELINE_FILES = (
    "model_index.json",
    "pipeline.py",
    "README.md",
    "grid.png",
    "loss_history.png",
    "scheduler/scheduler_config.json",
    *model_files("vae"),
    *model_files("unet"),
)
VAE_FILES = ("README.md", "config.json", "diffusion_pytorch_model.safetensors", "training_losses.png")
LAST_CHECKPOINT = "last-checkpoint"  # folder of the newest checkpoint in a repository, as transformers names it


def require_token() -> None:
    """Raise UserError if this machine has no token for the Hub."""
    if not get_token():
        raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")


def require_accepted_token() -> None:
    """Raise UserError if the Hub does not accept the token. Scripts and commands ask once, before they start."""
    require_token()
    try:
        HfApi().whoami()
    except Exception as error:  # many types: see `upload`
        hint = "run `hf auth login`, set HF_TOKEN, or check the connection"
        raise UserError(f"the Hub cannot be used with this token ({first_line(error)}): {hint}") from None


def is_part_of(folder: Path, file: Path) -> bool:
    """Return whether a file may be uploaded: it is no hidden file, and no link that leads out of the folder."""
    inside = file.resolve().is_relative_to(folder.resolve())
    return file.is_file() and inside and not file.name.startswith(".")


def is_vae(folder: Path, is_training: bool) -> bool:
    """Return whether a folder holds an AutoencoderKL that may be pushed.

    When its training has ended, the scale of its latents is in its config. An AutoencoderKL without it, whose folder
    holds a run, may be pushed by this run only.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    is_complete = config.get("latents_mean") is not None or not (folder / "metrics.jsonl").is_file()
    return config.get("_class_name") == "AutoencoderKL" and (is_complete or is_training)


def push(
    folder: Path,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    license_id: str | None = None,
    is_training: bool = False,
) -> str | None:
    """Upload a pipeline or a VAE with its model card in one commit. Return its address, or None with `dry_run`.

    Checkpoints, photos and files of the run are not uploaded. The token is that of `hf auth login` or of HF_TOKEN. It
    is never written or printed.

    Args:
        folder: a folder of train_unet.py or of train_vae.py.
        private: create a private repository.
        dry_run: only list the files.
        revision: the branch. None: the main branch.
        license_id: the license in the card, by its name on the Hub.
        is_training: the run that trains the model pushes it.

    Raises:
        UserError: there is no model in the folder, or the Hub refuses the upload.
    """
    if (folder / "model_index.json").is_file():
        flag, patterns = "--pipeline", PIPELINE_FILES + (model_files("guide") if has_guide(folder) else ())
    elif is_vae(folder, is_training):
        flag, patterns = "--vae", VAE_FILES
    else:
        raise UserError(
            f"{folder} contains neither a pipeline (no model_index.json) nor a trained VAE (an AutoencoderKL): "
            "give the --output-dir of train_unet.py as --pipeline, or that of train_vae.py as --vae"
        )
    if dry_run and not (folder / "README.md").is_file():
        print("README.md, the model card, will be written and pushed too")
    if not dry_run:
        require_token()  # before the card is changed
        write_card(folder, repo_id, license_id)
    again = f"corel-diffusers push {flag} {folder} --repo-id {repo_id}" + (" --private" if private else "")
    return upload(folder, patterns, repo_id, "model", again, private, dry_run, revision)


def push_so_far(args: TrainingArguments, checkpoint: Path) -> None:
    """Push the best model so far, and with --hub-strategy checkpoint the newest checkpoint beside it.

    A push that fails gives a notice. The run goes on, and the next push has everything again.
    """
    is_saved = any((args.run_dir / name).is_file() for name in ENTRY_FILES)
    if not args.push_to_hub or args.hub_strategy == "end" or not is_saved:
        return
    try:
        push(args.run_dir, args.hub_model_id, private=not args.hub_public, is_training=True)
        if args.hub_strategy == "checkpoint":
            HfApi().upload_folder(
                repo_id=args.hub_model_id,
                folder_path=checkpoint.parent,
                path_in_repo=LAST_CHECKPOINT,
                allow_patterns=f"{checkpoint.name}/*",
                delete_patterns="*",  # the checkpoint before; relative to path_in_repo
                commit_message=f"Upload {checkpoint.name}",
            )
    except Exception as error:  # many types: see `upload`
        print(f"notice: the run goes on without this push ({first_line(error)})")


def push_dataset(
    source: Path, repo_id: str, private: bool = True, dry_run: bool = False, license_id: str | None = None
) -> None:
    """Upload photos with their labels, captions and splits, as Parquet files that `load_dataset(repo_id)` reads.

    Args:
        source: a folder of photos.
        private, dry_run, license_id: see `push`.

    Raises:
        UserError: the photos cannot be loaded, or the Hub refuses the upload.
    """
    photos = load_photos(source)
    names = photos["train"].features["label"].names
    with tempfile.TemporaryDirectory() as temporary, explain_full_disk(Path(temporary), "TMPDIR"):
        folder = Path(temporary) / repo_id.split("/")[1]
        (folder / "data").mkdir(parents=True)
        for split, part in photos.items():
            whole = with_bytes(part, Path(temporary) / f"{split}.arrow")
            whole.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        counts = {split: len(part) for split, part in photos.items()}
        write_own(folder / "README.md", dataset_card(folder, repo_id, license_id, counts, names))
        again = f"corel-diffusers push-dataset --data-dir {source} --repo-id {repo_id}"
        again += "" if private else " --public"
        upload(folder, ("README.md", "data/*"), repo_id, "dataset", again, private, dry_run)


def upload(
    folder: Path,
    patterns: Sequence[str],
    repo_id: str,
    repo_type: str,
    again: str,
    private: bool,
    dry_run: bool,
    revision: str | None = None,
) -> str | None:
    """Upload the files of a folder that match the patterns, exactly those that are listed. Return: see `push`.

    Args:
        repo_type: "model" or "dataset".
        again: the command that tries the upload again, for messages.
        private, dry_run, revision: see `push`.
    """
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if is_part_of(folder, file))
    total_mb = sum(file.stat().st_size for file in files) / 1e6
    target = f"{repo_id}, branch {revision}" if revision else repo_id
    target += ", private" if private else ", public if it is new"
    print(f"{'would push' if dry_run else 'pushing'} {len(files)} files, {total_mb:.1f} MB, to {target}:")
    for file in files:
        print(f"  {file.relative_to(folder)}")
    if dry_run:
        return None

    api = HfApi()
    try:
        # create_repo would leave an existing public repository public
        exists = private and api.repo_exists(repo_id, repo_type=repo_type)
        if exists and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise UserError(
                "it exists and is public: make it private in its settings on the Hub, or allow a public upload: "
                "push without --private, push-dataset with --public, training with --hub-public"
            )
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            allow_patterns=[glob.escape(file.relative_to(folder).as_posix()) for file in files],
            # photos that were removed here, or a split that is no longer there
            delete_patterns="data/*" if repo_type == "dataset" else None,
            commit_message=f"Upload {'photos' if repo_type == 'dataset' else 'model'}",
            revision=revision,
        )
    except Exception as error:  # many types: refused, not found, no network, a name that the Hub does not accept
        raise UserError(f"{repo_id} was not pushed ({first_line(error)}): to try again, run {again}") from None
    print(f"pushed: {commit.commit_url}")
    return commit.commit_url
