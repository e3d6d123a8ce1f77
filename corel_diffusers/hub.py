"""The Hub: a model card with evidence, and the upload of a pipeline folder."""

import hashlib
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, get_token

from corel_diffusers.evaluation.report import card_rows, heading
from corel_diffusers.files import UserError, best_record, first_line, read_json, read_metrics, write_text
from corel_diffusers.generate import dpm_solver_options

PIPELINE_FILES = ("model_index.json", "pipeline.py", "README.md", "grid.png", "loss_history.png", "vae/*", "unet/*", "scheduler/*")
WRITTEN_BY = "<!-- Written from the run's own files; remove this line to keep your edits when it is written again. -->"

GUIDED = "`guide/` is the UNet early in its training: guidance leads away from it. `pipe.guide = None` leaves it out."


def write_card(folder: Path, repo_id: str = "user/name") -> None:
    """Writes README.md from what the run left in `folder`, to be loaded as `repo_id`.

    A card without the line WRITTEN_BY is the user's and stays as it is.
    """
    card = folder / "README.md"
    if not (folder / "model_index.json").is_file():  # stopped before the first epoch: there is nothing to describe
        return
    if card.is_file() and WRITTEN_BY not in card.read_text(encoding="utf-8"):
        return
    write_text(card, card_text(folder, repo_id))


def card_text(folder: Path, repo_id: str) -> str:
    """The model card: how to load, what it was trained on, with which commands, what was measured."""
    index = read_json(folder / "model_index.json")
    names = list((index.get("class_names") or {}).values())
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
        lines += ["![Generated pictures, a row for each class](grid.png)" if names else "![Generated pictures](grid.png)", ""]
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
        *([GUIDED] if has_guide(folder) else []),
        "",
    ]
    if (folder / "run.json").is_file():
        lines += training_lines(read_json(folder / "run.json"), read_metrics(folder / "metrics.jsonl"))
        lines += evaluation_lines(folder)
    return "\n".join(lines) + "\n"


def describe_vae(location: Path | str) -> dict | None:
    """The command and the best epoch's numbers of a VAE that train_vae.py left in a folder; None for any other."""
    history = read_metrics(Path(location) / "metrics.jsonl")
    if not history or not (Path(location) / "run.json").is_file():
        return None
    best = best_record(history)
    return {"command": read_json(Path(location) / "run.json")["command"], "best": best}


def training_lines(run: dict, history: list[dict]) -> list[str]:
    """The card's part on data, commands and measured numbers."""
    photos = run["data"]["photos"]
    lines = [
        "## Training",
        "",
        f"Photos: {photos['train']} to train on, {photos['validation']} held out; source `{run['data']['source']}`.",
        "",
    ]
    commands = [run["vae"]["command"]] if run.get("vae") else []
    lines += ["```bash", *commands, run["command"], "```", "", "| measured on the held-out photos | |", "|---|---|"]
    if run.get("vae"):
        best = run["vae"]["best"]
        lines += [f"| VAE reconstruction, PSNR | {best['val_psnr']:.2f} dB |", f"| VAE reconstruction, SSIM | {best['val_ssim']:.3f} |"]
    if history:
        best, last = best_record(history), history[-1]
        lines += [
            f"| denoising loss of these weights (epoch {best['epoch']}, step {best['step']}) | {best['val_loss']:.4f} |",
            f"| pictures seen in all, minutes | {last['images_seen']}, {last['seconds'] / 60:.1f} on {run['device']} |",
        ]
    return lines


def evaluation_lines(folder: Path) -> list[str]:
    """The card's rows of `corel-diffusers evaluate`, where it judged these weights and no earlier ones."""
    path = folder / "evaluation.json"
    if not path.is_file():  # the usual case while a run trains: no weights are hashed for nothing
        return []
    results = read_json(path)
    if results.get("unet_sha256") != pipeline_digest(folder):
        return []
    return [*card_rows(results), "", f"Evaluated: {heading(results)}. KID and FD of real photos against real ones are what perfect is."]


def pipeline_digest(folder: Path) -> str:
    """Stands for the weights of a pipeline folder, its guide's included: a card quotes no other's numbers."""
    parts = ("unet", "guide") if has_guide(folder) else ("unet",)
    return hashlib.sha256(b"".join((folder / part / "diffusion_pytorch_model.safetensors").read_bytes() for part in parts)).hexdigest()


def has_guide(folder: Path) -> bool:
    """Whether the pipeline has one; a folder of that name may be left of another."""
    return read_json(folder / "model_index.json").get("guide", [None])[0] is not None


def require_token() -> None:
    """Refuses to begin what would end in a push without a token."""
    if not get_token():
        raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, private: bool = False, dry_run: bool = False) -> None:
    """Uploads the pipeline folder with its card in one commit: no checkpoint, no photo, no run file.

    The token is the one that `hf auth login` or HF_TOKEN holds; it is neither written nor printed. Raises UserError.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--pipeline {folder} holds no pipeline (no model_index.json): give the --output-dir of train_unet.py")
    if not dry_run:
        write_card(folder, repo_id)
    patterns = PIPELINE_FILES + (("guide/*",) if has_guide(folder) else ())
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    total = sum(file.stat().st_size for file in files) / 1e6
    print(f"{'would push' if dry_run else 'pushing'} {len(files)} files, {total:.1f} MB, to {repo_id}{' (private)' if private else ''}:")
    for file in files:
        print(f"  {file.relative_to(folder)}")
    if dry_run:
        return
    require_token()
    api = HfApi()
    try:
        if private and api.repo_exists(repo_id) and not api.model_info(repo_id).private:  # which create_repo would leave as it is
            raise UserError("it exists and is public: make it private in its settings on the Hub, or leave out --private")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(patterns), commit_message="Upload pipeline")
    except Exception as error:  # the client has many: refused, not found, no network, a name that the Hub does not take
        again = f"corel-diffusers push --pipeline {folder} --repo-id {repo_id} tries again"
        raise UserError(f"{repo_id} was not pushed ({first_line(error)}): {again}") from None
    print(f"pushed: {commit.commit_url}")
