"""`corel-diffusers evaluate`: compare samples with photos and write a table, evaluation.json and evaluation.html."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from corel_diffusers.config.commands import Evaluate
from corel_diffusers.data.pixels import Pixels, cache_pixels, evenly_spaced
from corel_diffusers.data.training_photos import count_trained_on
from corel_diffusers.evaluation import report
from corel_diffusers.evaluation.classes import class_scores
from corel_diffusers.evaluation.features import as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.inputs import concatenate_pixels, photos_to_compare, pick_held_out, read_images
from corel_diffusers.evaluation.judge import stratified_labels
from corel_diffusers.evaluation.memorization import PIXEL_RATIO, CopyFinder, Nearest, planted_copies
from corel_diffusers.evaluation.metrics import colour_statistics, compare, halves, within_class_distance
from corel_diffusers.evaluation.reconstruction import MAX_COMPARED, reconstruct, reconstruction_scores, vae_rendering
from corel_diffusers.files import write_json
from corel_diffusers.runtime.precision import resolve_precision
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device, pipeline_digest, sample_size_px
from corel_diffusers.sampling.samplers import set_sampler
from corel_diffusers.sampling.samples import guidance_interval, labels_for_images, sample_images

# Maximum number of held-out photos in the search for copies. This measures the false alarms.
MAX_CONTROL_PHOTOS = 500
# Maximum number of training photos that are mirrored, cropped and searched for. This measures the detection rate.
MAX_PLANTED = 200


def evaluate(args: Evaluate) -> None:
    """Evaluate samples, write evaluation.json and evaluation.html to `args.results_dir`, and print the table.

    Raises:
        UserError: a flag or a file cannot be used. The message says what to do.
    """
    start_seconds, device = time.monotonic(), pick_device(args.device)
    output_dir = args.results_dir
    args.mixed_precision = resolve_precision(args.mixed_precision, device.type)
    pipe = None if args.pictures else load_pipeline(args.pipeline, device)
    images = read_images(Path(args.base_dir) / args.pictures) if args.pictures else []
    size_px = sample_size_px(pipe) if pipe else (images[0].height, images[0].width)
    photos, pixels = cache_pixels(photos_to_compare(args, pipe), size_px)
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
    nearest = finder.search(samples)  # in pixels, in features

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
    }
    rendered = render(pixels[held_out])
    control_photos = None if held_out == "all" else rendered.evenly_spaced(MAX_CONTROL_PHOTOS)
    planted = planted_copies(training_photos.evenly_spaced(MAX_PLANTED).values[:])
    planted = reconstruct(pipe.vae, planted, args.mixed_precision) if pipe else planted
    results["copies"] = copy_fractions(finder, nearest, planted, control_photos)
    if held_out != "all":
        both_labels = {"labels_a": subset_labels["train"], "labels_b": subset_labels[held_out]}
        results["train_against_held_out"] = compare(subset_features["train"], subset_features[held_out], **both_labels)
    if labels is None:
        results["diversity"] = {
            "pictures": within_class_distance(features, None),
            "photos": within_class_distance(subset_features["all"], None),
        }
    else:
        of_photos = {split: (real_features[split], photo_labels[split]) for split in real_features}
        results["diversity"] = {
            "pictures": within_class_distance(features, labels),
            "photos": within_class_distance(*of_photos["all"]),
        }
        of_held_out = of_photos[held_out] if held_out != "all" else None
        results["classes"] = class_scores(
            class_names, (features, labels), of_photos["train"], of_photos["all"], of_held_out
        )
    sheets = {
        "Samples": report.sample_sheet(samples, labels, class_names),
        "Samples most like copies, in features": report.pair_sheet(samples, training_photos.values, nearest[1]),
        "Samples most like copies, in pixels": report.pair_sheet(samples, training_photos.values, nearest[0]),
    }
    if pipe:
        originals, reconstructions = pixels[held_out].values, rendered.values
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
    pixel_pairs, feature_pairs = (found.with_file_names(files) for found in nearest)
    results["nearest"] = {"pixels": pixel_pairs, "features": feature_pairs}  # one entry per sample, in order

    write_json(output_dir / "evaluation.json", results)
    report.write_html(output_dir / "evaluation.html", results, sheets)
    print(report.table_text(results))
    print(
        f"numbers: {output_dir / 'evaluation.json'}\n"
        f"report with images: {output_dir / 'evaluation.html'} (it contains your photos)"
    )


def copy_fractions(
    finder: CopyFinder, nearest: tuple[Nearest, Nearest], planted: np.ndarray, control_photos: Pixels | None
) -> dict:
    """Return the fractions of samples, planted copies and control photos that count as copies, and their numbers.

    Args:
        nearest: the result of `finder.search` for the samples.
        planted: copies of training photos, which the search has to find: uint8 (N, H, W, 3).
        control_photos: held-out photos, which are not copies. None: there are none.
    """
    fractions = {
        "pixel_ratio": PIXEL_RATIO,
        "feature_ratio": finder.feature_ratio,
        "features": finder.network.name,
        "pictures": finder.shares(*nearest),
        "planted": finder.shares(*finder.search(planted)),
        "n": {"pictures": len(nearest[0].ratio)},
    }
    if control_photos is not None:
        fractions["held_out"] = finder.shares(*finder.search(control_photos.values[:]))
        fractions["n"]["held_out"] = len(control_photos)
    return fractions


def make_samples(
    args: Evaluate, pipe: DiffusionPipeline, class_names: list[str], photo_labels: torch.Tensor
) -> tuple[list[Image.Image], torch.Tensor | None, dict]:
    """Generate the samples to evaluate.

    Returns:
        The samples, their labels in the numbering of the photos (None if the model lacks a class of the photos), and
        the settings that they were generated with.
    """
    sampler, steps = set_sampler(pipe, args)
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
