"""The Hub: write a model card with measured numbers, and upload a pipeline folder."""

import glob
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, get_token

from corel_diffusers.evaluation.report import card_rows, heading
from corel_diffusers.files import UserError, best_record, first_line, read_json, read_metrics, write_text
from corel_diffusers.sampling.pipelines import has_guide, pipeline_digest
from corel_diffusers.sampling.samplers import dpm_solver_options

PIPELINE_FILES = (
    "model_index.json",
    "pipeline.py",
    "README.md",
    "grid.png",
    "loss_history.png",
    "vae/*",
    "unet/*",
    "scheduler/*",
)
WRITTEN_BY = "<!-- Written from the run's own files; remove this line to keep your edits when it is written again. -->"
GUIDED = (
    "`guide/` is the guide model, the UNet early in its training: guidance leads away from its prediction. "
    "`pipe.guide = None` turns it off."
)


def write_card(folder: Path, repo_id: str = "user/name") -> None:
    """Write the model card README.md from the files of the run in `folder`.

    A card without the line WRITTEN_BY was written or edited by the user and is not changed.

    Args:
        repo_id: the Hub id in the card's example of loading the model.
    """
    card = folder / "README.md"
    if not (folder / "model_index.json").is_file():  # stopped before the first epoch: there is no pipeline
        return
    if card.is_file() and WRITTEN_BY not in card.read_text(encoding="utf-8", errors="replace"):
        return
    write_text(card, card_text(folder, repo_id))


def card_text(folder: Path, repo_id: str) -> str:
    """Return the model card: how to load the model, its training data, its commands and its measured numbers."""
    index = read_json(folder / "model_index.json")
    names = [name for _, name in sorted((index.get("class_names") or {}).items(), key=lambda item: int(item[0]))]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "latent-diffusion", "autoencoder-kl", *(["class-conditional"] if names else [])],
    )
    label = f', class_labels="{names[0]}"' if names else ""
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    clip = "".join(f", {name}={value}" for name, value in dpm_solver_options(scheduler).items())
    lines = ["---", data.to_yaml(), "---", WRITTEN_BY, "", f"# {folder.resolve().name}", ""]
    lines += ["A latent diffusion model, VAE and UNet trained from scratch with corel_diffusers.", ""]
    if (folder / "grid.png").is_file():
        lines += [
            "![Samples, one row per class](grid.png)" if names else "![Samples](grid.png)",
            "",
        ]
    lines += [
        "## Use",
        "",
        "```python",
        "from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)',
        f"pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config{clip})",
        f"images = pipe(num_images=4{label}, num_inference_steps=15).images",
        "```",
        "",
        "`pipeline.py` is in this repository and imports torch and diffusers only.",
        *([f"Classes: {', '.join(names)}."] if names else []),
        *size_lines(list(index.get("image_sizes") or {})),
        *([GUIDED] if has_guide(folder) else []),
        "",
    ]
    if (folder / "run.json").is_file():
        lines += training_lines(read_json(folder / "run.json"), read_metrics(folder / "metrics.jsonl"))
        lines += evaluation_lines(folder)
    return "\n".join(lines) + "\n"


def size_lines(sizes: list[str]) -> list[str]:
    """Return the line of the model card about the image sizes, if there are several. sizes: such as "64x96"."""
    if not sizes:
        return []
    height, width = sizes[-1].split("x")
    return [f"Image sizes (height x width): {', '.join(sizes)}, for example `pipe(height={height}, width={width})`."]


def describe_vae(location: Path | str) -> dict | None:
    """Return the command and the best epoch's metrics of a VAE that train_vae.py trained, or None for any other VAE."""
    history = read_metrics(Path(location) / "metrics.jsonl")
    if not history or not (Path(location) / "run.json").is_file():
        return None
    best = best_record(history)
    return {"command": read_json(Path(location) / "run.json")["command"], "best": best}


def training_lines(run: dict, history: list[dict]) -> list[str]:
    """Return the lines of the model card with the data, the commands and the measured numbers."""
    photos = run["data"]["photos"]
    lines = [
        "## Training",
        "",
        f"Photos: {photos['train']} for training, {photos['validation']} held out; source `{run['data']['source']}`.",
        "",
    ]
    commands = [run["vae"]["command"]] if run.get("vae") else []
    lines += ["```bash", *commands, run["command"], "```", "", "| measured on the held-out photos | |", "|---|---|"]
    if run.get("vae"):
        best = run["vae"]["best"]
        lines += [
            f"| VAE reconstruction, PSNR | {best['val_psnr']:.2f} dB |",
            f"| VAE reconstruction, SSIM | {best['val_ssim']:.3f} |",
        ]
    if history:
        best, last = best_record(history), history[-1]
        lines += [
            f"| denoising loss of these weights (epoch {best['epoch']}, step {best['step']}) "
            f"| {best['val_loss']:.4f} |",
            f"| images seen, minutes | {last['images_seen']}, {last['seconds'] / 60:.1f} on {run['device']} |",
        ]
    return lines


def evaluation_lines(folder: Path) -> list[str]:
    """Return the lines of the model card with the results of `corel-diffusers evaluate`.

    The list is empty if there is no evaluation, or if it was made with other weights.
    """
    path = folder / "evaluation.json"
    if not path.is_file():  # usual during training: return before the weights are hashed
        return []
    results = read_json(path)
    if results.get("unet_sha256") != pipeline_digest(folder):
        return []
    return [
        *card_rows(results),
        "",
        f"Evaluated: {heading(results)}. A perfect model has the KID and FD of real photos against real photos.",
    ]


def require_token() -> None:
    """Raise UserError if there is no token for the Hub. Training for a push calls this before it starts."""
    if not get_token():
        raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")


def is_part_of(folder: Path, file: Path) -> bool:
    """Return whether a file may be uploaded: it is no hidden file, and no link that leads out of the folder."""
    inside = file.resolve().is_relative_to(folder.resolve())
    return file.is_file() and inside and not file.name.startswith(".")


def push(folder: Path, repo_id: str, private: bool = False, dry_run: bool = False, revision: str | None = None) -> None:
    """Upload the pipeline folder with its model card in one commit.

    Checkpoints, photos and files of the run are not uploaded. The token is that of `hf auth login` or of HF_TOKEN. It
    is never written or printed.

    Args:
        private: create a private repository.
        dry_run: only list the files.
        revision: the branch. None: the main branch.

    Raises:
        UserError: there is no pipeline in the folder, there is no token, or the Hub refuses the upload.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"--pipeline {folder} does not contain a pipeline (no model_index.json): "
            "give the --output-dir of train_unet.py"
        )
    if not dry_run:
        require_token()
        write_card(folder, repo_id)
    patterns = PIPELINE_FILES + (("guide/*",) if has_guide(folder) else ())
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if is_part_of(folder, file))
    total_mb = sum(file.stat().st_size for file in files) / 1e6
    target = f"{repo_id}, branch {revision}" if revision else repo_id
    target += ", private" if private else ", public if it is new"
    print(f"{'would push' if dry_run else 'pushing'} {len(files)} files, {total_mb:.1f} MB, to {target}:")
    for file in files:
        print(f"  {file.relative_to(folder)}")
    if dry_run:
        return
    api = HfApi()
    try:
        # create_repo would leave an existing public repository public
        if private and api.repo_exists(repo_id) and not api.model_info(repo_id).private:
            raise UserError(
                "it exists and is public: make it private in its settings on the Hub, or allow a public upload "
                "(push without --private, train_unet.py with --hub-public)"
            )
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(file.relative_to(folder).as_posix()) for file in files],
            commit_message="Upload pipeline",
            revision=revision,
        )
    except Exception as error:  # many types: refused, not found, no network, a name that the Hub does not accept
        hint = f"to try again, run corel-diffusers push --pipeline {folder} --repo-id {repo_id}"
        raise UserError(f"{repo_id} was not pushed ({first_line(error)}): {hint}") from None
    print(f"pushed: {commit.commit_url}")
