"""Write model cards with measured numbers. The texts are the templates `*_card.md` beside this file."""

from pathlib import Path

from huggingface_hub import CardData, DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from corel_diffusers.evaluation.report import card_rows, heading
from corel_diffusers.files import best_record, read_json, read_metrics, write_text
from corel_diffusers.sampling.pipelines import has_guide, weights_digests
from corel_diffusers.saved_models import decoder_tuning

WRITTEN_BY = "<!-- Written from the run's own files; remove this line to keep your edits when it is written again. -->"
TEMPLATES = Path(__file__).parent
PLACEHOLDER_ID = "user/name"  # in the card of a model that was not pushed
TASK = "unconditional-image-generation"


def write_card(folder: Path, repo_id: str | None = None, license_id: str | None = None) -> None:
    """Write the card README.md of the pipeline or the VAE in `folder`, from the files of its run.

    A card without the line WRITTEN_BY was written or edited by the user and is not changed.

    Args:
        repo_id: the Hub id in the card's example of loading the model. None: user/name.
        license_id: the license, by its name on the Hub. None: that of the run's flags, if there is one.
    """
    is_pipeline = (folder / "model_index.json").is_file()
    if not is_pipeline and not (folder / "config.json").is_file():  # stopped before the first epoch: there is no model
        return
    write_own(
        folder / "README.md",
        (pipeline_card if is_pipeline else vae_card)(folder, repo_id or PLACEHOLDER_ID, license_id),
    )


def write_own(file: Path, text: str) -> None:
    """Write a card, unless the user wrote or edited the one that is there."""
    if not file.is_file() or WRITTEN_BY in file.read_text(encoding="utf-8", errors="replace"):
        write_text(file, text)


def pipeline_card(folder: Path, repo_id: str, license_id: str | None) -> str:
    """Return the card of a pipeline: how to load it, its training data, its commands and its measured numbers."""
    index = read_json(folder / "model_index.json")
    names = [name for _, name in sorted((index.get("class_names") or {}).items(), key=lambda item: int(item[0]))]
    run, history, evaluation = run_of(folder), read_metrics(folder / "metrics.jsonl"), evaluation_of(folder)
    data = card_data(
        run, license_id, TASK, ["latent-diffusion", "autoencoder-kl", *(["class-conditional"] if names else [])]
    )
    if evaluation:
        data.model_name, data.eval_results = folder.resolve().name, measured(evaluation, run)
    return render(
        ModelCard, data, "model_card.md", folder, repo_id,
        class_names=names,
        sizes=list(index.get("image_sizes") or {}),
        has_grid=(folder / "grid.png").is_file(),
        has_guide=has_guide(folder),
        tuning=decoder_tuning(folder),
        run=run,
        best=history and best_record(history),
        last=history and history[-1],
        evaluation_rows=card_rows(evaluation) if evaluation else [],
        evaluated=heading(evaluation) if evaluation else "",
    )  # fmt: skip


def describe_vae(location: Path | str) -> dict | None:
    """Return the command and the best epoch's metrics of a VAE that train_vae.py trained, or None for any other VAE."""
    history = read_metrics(Path(location) / "metrics.jsonl")
    run = run_of(Path(location))
    return {"command": run["command"], "best": best_record(history)} if history and run else None


def vae_card(folder: Path, repo_id: str, license_id: str | None) -> str:
    """Return the card of a VAE: how to load it, its training data, its command and its measured numbers."""
    config, run, history = read_json(folder / "config.json"), run_of(folder), read_metrics(folder / "metrics.jsonl")
    size = config["sample_size"]
    return render(
        ModelCard, card_data(run, license_id, None, ["autoencoder-kl"]), "vae_card.md", folder, repo_id,
        size="x".join(map(str, size if isinstance(size, list) else [size, size])),
        channels=config["latent_channels"],
        factor=2 ** (len(config["block_out_channels"]) - 1),
        has_scale=config.get("latents_mean") is not None,
        run=run if history else {},
        best=history and best_record(history),
        last=history and history[-1],
    )  # fmt: skip


def dataset_card(folder: Path, repo_id: str, license_id: str | None, counts: dict[str, int], names: list[str]) -> str:
    """Return the card of a data set of photos. counts: split -> number of photos. names: of the classes."""
    data = DatasetCardData(license=license_id, task_categories=[TASK, "image-classification"], tags=["corel_diffusers"])
    return render(
        DatasetCard, data, "dataset_card.md", folder, repo_id,
        counts=", ".join(f"{count} {split}" for split, count in counts.items()),
        class_names=names,
    )  # fmt: skip


def render(kind: type[ModelCard], data: CardData, template: str, folder: Path, repo_id: str, **values: object) -> str:
    """Return the text of a template of this folder, with the card's data at its top."""
    card = kind.from_template(
        data,
        template_path=str(TEMPLATES / template),
        name=folder.resolve().name if repo_id == PLACEHOLDER_ID else repo_id.split("/")[1],
        repo_id=repo_id,
        written_by=WRITTEN_BY,
        **values,
    )
    return card.content.rstrip() + "\n"


def run_of(folder: Path) -> dict:
    """Return run.json of a folder, or {} if it has none."""
    return read_json(folder / "run.json") if (folder / "run.json").is_file() else {}


def hub_dataset(run: dict) -> str | None:
    """Return the Hub id of the data set of a run, or None if the photos came from a folder."""
    name = run.get("flags", {}).get("dataset_name")
    return name and name.partition(":")[0]  # without the name of the configuration


def card_data(run: dict, license_id: str | None, task: str | None, tags: list[str]) -> ModelCardData:
    """Return what the Hub reads: license, data set, base model and tags."""
    flags = run.get("flags", {})
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=license_id or flags.get("license"),
        datasets=hub_dataset(run),
        base_model=run.get("base_model"),
        tags=["diffusers", *tags],
    )


def evaluation_of(folder: Path) -> dict:
    """Return evaluation.json of a pipeline, or {} if there is none or if it was made with other weights."""
    path = folder / "evaluation.json"
    results = read_json(path) if path.is_file() else {}  # usual during training: return before the weights are hashed
    if not results:
        return {}
    # earlier versions did not record the VAE
    weights = {name: results[name] for name in ("unet_sha256", "vae_sha256") if name in results}
    return results if weights and weights.items() <= weights_digests(folder).items() else {}


def measured(evaluation: dict, run: dict) -> list[EvalResult]:
    """Return KID, FD and copies for the page of the model on the Hub."""
    source = run.get("data", {}).get("source", "photos")
    counts = evaluation["generation"]["n"]
    shared = {
        "task_type": TASK,
        "dataset_type": hub_dataset(run) or "imagefolder",
        "dataset_name": source,
        "dataset_split": evaluation.get("held_out"),
    }
    text = f"{counts[0]} samples, {counts[1]} photos, {evaluation['features']}"
    values = {
        ("kid", f"KID x1000 ({text})"): evaluation["generation"].get("kid_e3"),
        ("fd", f"FD ({text})"): evaluation["generation"].get("fd"),
        ("copies", f"copies of training photos in pixels ({text})"): evaluation["copies"]["pictures"]["pixels"],
    }
    return [
        EvalResult(metric_type=kind, metric_name=name, metric_value=float(f"{value:.6g}"), **shared)
        for (kind, name), value in values.items()
        if value is not None
    ]
