"""`corel-diffusers evaluate`: compare samples with photos and write a table, evaluation.json and evaluation.html."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from diffusers import DiffusionPipeline
from PIL import Image

from corel_diffusers.config.commands import Evaluate
from corel_diffusers.data.cache import digest
from corel_diffusers.data.decoding import PhotoError, fit_photo, open_photo
from corel_diffusers.data.folders import PHOTO_ENDINGS
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import Pixels, cache_pixels, evenly_spaced
from corel_diffusers.data.training_photos import count_trained_on
from corel_diffusers.evaluation import report
from corel_diffusers.evaluation.features import as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.judge import stratified_labels
from corel_diffusers.evaluation.memorization import PIXEL_RATIO, CopyFinder, planted_copies
from corel_diffusers.evaluation.metrics import (
    MIN_PHOTOS,
    class_match,
    colour_statistics,
    compare,
    halves,
    within_class_distance,
)
from corel_diffusers.evaluation.reconstruction import MAX_COMPARED, reconstruct, reconstruction_scores, vae_rendering
from corel_diffusers.files import UserError, read_json, write_json
from corel_diffusers.runtime.precision import resolve_precision
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device, picture_size_px, pipeline_digest
from corel_diffusers.sampling.samplers import build_sampler, pick_sampler, possible_steps
from corel_diffusers.sampling.samples import guidance_interval, labels_for_images, sample_images

# Maximum number of held-out photos in the search for copies. This measures the false alarms.
MAX_CONTROL_PHOTOS = 500
# Maximum number of training photos that are mirrored, cropped and searched for. This measures the detection rate.
MAX_PLANTED = 200


def evaluate(args: Evaluate, source: Path | str, output_dir: Path) -> None:
    """Evaluate samples, write evaluation.json and evaluation.html to `output_dir`, and print the table.

    Args:
        args: the flags.
        source: the photos, as a folder or a Hub dataset id.
        output_dir: the folder for the two files. In a pipeline folder, the model card is updated too.

    Raises:
        UserError: a flag or a file cannot be used. The message says what to do.
    """
    start_seconds, device = time.monotonic(), pick_device(args.device)
    args.mixed_precision = resolve_precision(args.mixed_precision, device.type)
    pipe = None if args.pictures else load_pipeline(args.pipeline, device)
    images = read_images(Path(args.base_dir) / args.pictures) if args.pictures else []
    size_px = picture_size_px(pipe) if pipe else (images[0].height, images[0].width)
    photos, pixels = cache_pixels(photos_to_compare(args, source, pipe), size_px)
    class_names = photos["train"].features["label"].names
    photo_labels = {split: torch.tensor(part["label"][:]) for split, part in photos.items()}
    held_out = pick_held_out(args.against, pixels)
    # The training photos of --pictures are unknown, so validation photos count as training photos unless held out.
    training_splits = ["train"] if pipe else [split for split in ("train", "validation") if split != held_out]
    training_photos = pixels["train"] if pipe else concatenate_pixels([pixels[split] for split in training_splits])
    network = load_network(args.features, device)
    real_features = {split: photo_features(network, part) for split, part in pixels.items()}
    subset_features = {
        split: features[evenly_spaced(len(features), MAX_COMPARED)] for split, features in real_features.items()
    }
    subset_labels = {split: labels[evenly_spaced(len(labels), MAX_COMPARED)] for split, labels in photo_labels.items()}
    photo_colours = colour_statistics(
        concatenate_pixels([part.evenly_spaced(MAX_COMPARED) for part in pixels.values()]).values
    )
    for by_split in (real_features, subset_features, photo_labels, subset_labels):
        by_split["all"] = torch.cat(list(by_split.values()))
    if held_out == "all":
        pixels["all"] = concatenate_pixels(list(pixels.values()))

    labels, settings = None, {"pictures": Path(args.pictures or ".").name}
    if pipe:
        images, labels, settings = make_samples(args, pipe, class_names, photo_labels[held_out])
    samples = as_array(images)
    features = extract(network, samples)
    render = partial(vae_rendering, pipe.vae, precision=args.mixed_precision) if pipe else lambda part: part
    finder = CopyFinder.of(training_photos, render(training_photos), device)
    nearest_in_pixels, nearest_in_features = finder.search(samples)

    results = settings | {
        "only_classes": class_names if args.classes else None,
        "photos": {split: len(part) for split, part in photos.items()},
        "held_out": held_out,
        "size_px": list(size_px),
        "features": network.name,
        "generation": compare(
            features,
            real_features[held_out],
            labels_a=labels,
            labels_b=photo_labels_for_kid(photo_labels, held_out, labels),
        ),
        "halves": halves(subset_features["all"], subset_labels["all"]),
        "colours": {"pictures": colour_statistics(samples), "photos": photo_colours},
        "copies": {"pixel_ratio": PIXEL_RATIO, "feature_ratio": finder.feature_ratio, "features": finder.network.name},
    }
    results["copies"]["pictures"] = finder.shares(nearest_in_pixels, nearest_in_features)
    planted = planted_copies(training_photos.evenly_spaced(MAX_PLANTED).values[:])
    planted = reconstruct(pipe.vae, planted, args.mixed_precision) if pipe else planted
    results["copies"]["planted"] = finder.shares(*finder.search(planted))
    results["copies"]["n"] = {"pictures": len(samples)}
    if held_out != "all":
        both_labels = {"labels_a": subset_labels["train"], "labels_b": subset_labels[held_out]}
        results["train_against_held_out"] = compare(subset_features["train"], subset_features[held_out], **both_labels)
        control_photos = render(pixels[held_out]).evenly_spaced(MAX_CONTROL_PHOTOS).values[:]
        results["copies"]["held_out"] = finder.shares(*finder.search(control_photos))
        results["copies"]["n"]["held_out"] = len(control_photos)
    if labels is None:
        results["diversity"] = {
            "pictures": within_class_distance(features, None),
            "photos": within_class_distance(subset_features["all"], None),
        }
    else:
        labelled_samples, labelled_photos = (
            (features, labels),
            {split: (real_features[split], photo_labels[split]) for split in real_features},
        )
        results["diversity"] = {
            "pictures": within_class_distance(*labelled_samples),
            "photos": within_class_distance(*labelled_photos["all"]),
        }
        labelled_held_out = labelled_photos[held_out] if held_out != "all" else None
        results["classes"] = class_scores(
            class_names, labelled_samples, labelled_photos["train"], labelled_photos["all"], labelled_held_out
        )
    sheets = {
        "Samples": report.sample_sheet(samples, labels, class_names),
        "Samples most like copies, in features": report.pair_sheet(
            samples, training_photos.values, nearest_in_features
        ),
        "Samples most like copies, in pixels": report.pair_sheet(samples, training_photos.values, nearest_in_pixels),
    }
    if pipe:
        originals, reconstructions = pixels[held_out].values, render(pixels[held_out]).values
        results["reconstruction"] = reconstruction_scores(
            reconstructions, originals, network, real_features[held_out], photo_labels[held_out]
        )
        title = "Photos" if held_out == "all" else "Held-out photos"
        sheets[f"{title} and their VAE reconstructions"] = report.reconstruction_sheet(originals, reconstructions)
    if isinstance(args.pipeline, Path) and pipe:
        results["unet_sha256"] = pipeline_digest(args.pipeline)
        if held_out != "all":
            results["held_out_trained_on"] = count_trained_on(args.pipeline, photos[held_out]["file_name"][:])
    results["seconds"] = round(time.monotonic() - start_seconds, 1)
    files = [name for split in training_splits for name in photos[split]["file_name"][:]]
    results["nearest"] = {  # one entry per sample, in order
        "pixels": nearest_in_pixels.with_file_names(files),
        "features": nearest_in_features.with_file_names(files),
    }

    write_json(output_dir / "evaluation.json", results)
    report.write_html(output_dir / "evaluation.html", results, sheets)
    print(report.table_text(results))
    print(
        f"numbers: {output_dir / 'evaluation.json'}\n"
        f"report with images: {output_dir / 'evaluation.html'} (it contains your photos)"
    )


def make_samples(
    args: Evaluate, pipe: DiffusionPipeline, class_names: list[str], photo_labels: torch.Tensor
) -> tuple[list[Image.Image], torch.Tensor | None, dict]:
    """Generate the samples to evaluate.

    Returns:
        The samples, their labels in the numbering of the photos (None if the model lacks a class of the photos), and
        the settings that they were generated with.
    """
    sampler, steps = pick_sampler(args)
    pipe.scheduler = build_sampler(sampler, pipe.scheduler)
    steps = possible_steps(pipe.scheduler, steps)
    model_labels, labels = labels_to_draw(pipe, class_names, photo_labels, args.num_images)
    images = list(sample_images(pipe, args, model_labels, args.seed, num_inference_steps=steps))
    settings = {"pipeline": Path(args.pipeline).name, "sampler": sampler, "steps": steps, "seed": args.seed}
    has_guide = getattr(pipe, "guide", None) is not None  # pipelines of an earlier version have no attribute `guide`
    settings |= {
        "mixed_precision": args.mixed_precision,
        # Guidance needs a guide model or classes. Without both, it has no effect.
        "guidance_scale": args.guidance_scale if has_guide or model_labels else 1.0,
        "guidance_interval": guidance_interval(args, pipe),
        "guide": has_guide,
    }
    return images, labels, settings


def photo_labels_for_kid(
    photo_labels: dict[str, torch.Tensor], held_out: str, sample_labels: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the labels of the photos for KID, or None if the photos count as drawn at random.

    A split has a fixed number of photos per class, so KID needs their labels. If all photos are compared, KID needs
    their labels only if the samples have labels too.
    """
    return None if held_out == "all" and sample_labels is None else photo_labels[held_out]


def labels_to_draw(
    pipe: DiffusionPipeline, class_names: list[str], photo_labels: torch.Tensor, count: int
) -> tuple[list[int] | None, torch.Tensor | None]:
    """Return a class for each sample, with the class fractions of the photos that the samples are compared with.

    If the model lacks a class of the photos, all classes of the model are equally frequent.

    Returns:
        The labels in the numbering of the model (None if the model has no classes), and the same labels in the
        numbering of the photos (None if the model lacks a class of the photos).
    """
    model_label = {name: int(label) for label, name in (pipe.config.class_names or {}).items()}
    if not set(class_names) <= set(model_label):
        return labels_for_images(pipe, (), count), None
    labels = stratified_labels(photo_labels, count)
    return [model_label[class_names[label]] for label in labels.tolist()], labels


def read_images(folder: Path) -> list[Image.Image]:
    """Read all images in a folder and its subfolders, sorted by path, and resize them to the size of the first one.

    Raises:
        UserError: an image cannot be read, or there are fewer than MIN_PHOTOS.
    """
    images = []
    for file in sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in PHOTO_ENDINGS and not file.name.startswith(".")
    ):
        try:
            images.append(open_photo(file))
        except PhotoError as error:
            raise UserError(f"--pictures {folder}: {file.name} cannot be used ({error}): remove it") from None
    if len(images) < MIN_PHOTOS:
        raise UserError(
            f"--pictures {folder} contains {len(images)} images: "
            f"give {MIN_PHOTOS} or more (the numbers are reliable from a few hundred)"
        )
    return [image if image.size == images[0].size else fit_photo(image, images[0].size[::-1]) for image in images]


def photos_to_compare(args: Evaluate, source: Path | str, pipe: DiffusionPipeline | None) -> DatasetDict:
    """Load the photos of --classes. Without that flag, load the photos of the classes that the model has.

    All photos are loaded if there is no pipeline, or if the classes of the model are not a proper subset of the
    classes of the photos.
    """
    photos = load_photos(source, classes=args.classes)
    if args.classes or not pipe:
        return photos
    trained_classes = set((pipe.config.class_names or {}).values())
    run_file = Path(args.pipeline) / "run.json"
    if not trained_classes and run_file.is_file():  # a model that was trained on one class has no labels
        trained_classes = set(read_json(run_file)["data"]["classes"])
    return (
        load_photos(source, classes=sorted(trained_classes))
        if trained_classes and trained_classes < set(photos["train"].features["label"].names)
        else photos
    )


def pick_held_out(against: str, pixels: dict[str, Pixels]) -> str:
    """Return the split to compare with.

    Raises:
        UserError: the split is missing or too small.
    """
    split = ("test" if "test" in pixels else "validation") if against == "auto" else against
    if split not in {*pixels, "all"}:
        raise UserError(
            f"--against {split}: no photos were set aside as test: "
            "run prepare with --test-fraction 0.15, or leave the flag out"
        )
    count = sum(map(len, pixels.values())) if split == "all" else len(pixels[split])
    if count < MIN_PHOTOS:
        raise UserError(
            f"--data-dir has only {count} photos to compare with in {split}, at least {MIN_PHOTOS} are needed: "
            "give --against all"
        )
    return split


def concatenate_pixels(parts: list[Pixels]) -> Pixels:
    """Return the photos of several splits as one Pixels."""
    return Pixels(np.concatenate([part.values for part in parts]), digest([part.key for part in parts]))


Labelled = tuple[torch.Tensor, torch.Tensor]  # features (N, D) and labels (N,)


def class_scores(
    class_names: list[str], samples: Labelled, train: Labelled, photos: Labelled, held_out: Labelled | None
) -> dict[str, dict]:
    """Return the results of `compare` and the class accuracy for each class.

    The samples of a class are compared with its held-out photos. If fewer than MIN_PHOTOS of them are held out, the
    samples are compared with all photos of the class. The key `against` says which. All photos include training photos.
    A model that copies training photos has a lower distance to them.

    The key `match` is the class accuracy: the fraction of samples that are closest to the mean training photo of their
    own class. `match_photos` is the same fraction of the held-out photos, or None if the class has no held-out photos.

    A class with fewer than two samples or two photos is left out.
    """
    matches = class_match(*samples, *train)
    photo_matches = class_match(*held_out, *train) if held_out else None
    scores = {}
    for label, name in enumerate(class_names):
        of_class, held_out_of_class = (
            samples[1] == label,
            held_out[1] == label if held_out else torch.zeros(0, dtype=torch.bool),
        )
        enough = held_out_of_class.sum() >= MIN_PHOTOS
        compared_photos = held_out[0][held_out_of_class] if enough else photos[0][photos[1] == label]
        if of_class.sum() < 2 or len(compared_photos) < 2:
            continue
        scores[name] = compare(samples[0][of_class], compared_photos) | {
            "against": "held-out" if enough else "all",
            "match": float(matches[of_class].double().mean()),
            "match_photos": float(photo_matches[held_out_of_class].double().mean())
            if held_out_of_class.any()
            else None,
        }
    return scores
