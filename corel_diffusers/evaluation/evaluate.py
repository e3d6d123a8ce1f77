"""`corel-diffusers evaluate`: compare samples with photos and write a table, evaluation.json and evaluation.html."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from corel_diffusers.config.checks import user_path
from corel_diffusers.config.commands import Evaluate
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.data.training_photos import count_trained_on
from corel_diffusers.evaluation import report
from corel_diffusers.evaluation.classes import class_scores
from corel_diffusers.evaluation.features import as_array, extract
from corel_diffusers.evaluation.inputs import ComparedPhotos, read_images
from corel_diffusers.evaluation.judge import stratified_rows
from corel_diffusers.evaluation.memorization import PIXEL_RATIO, CopyFinder, Nearest, planted_copies
from corel_diffusers.evaluation.metrics import colour_statistics, compare, halves, within_class_distance
from corel_diffusers.evaluation.reconstruction import MAX_COMPARED, reconstruct, reconstruction_scores, vae_rendering
from corel_diffusers.files import write_json
from corel_diffusers.runtime.precision import resolve_precision
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device, trained_sizes_px, weights_digests
from corel_diffusers.sampling.samplers import set_sampler
from corel_diffusers.sampling.samples import guidance_interval, labels_for_images, sample_images

# Maximum number of held-out photos in the search for copies. The fraction that is found is the rate of false alarms.
MAX_CONTROL_PHOTOS = 500
# Maximum number of training photos that are mirrored, cropped and searched for. The fraction that is found is the
# detection rate.
MAX_PLANTED = 200


def evaluate(args: Evaluate) -> dict:
    """Evaluate samples, write evaluation.json and evaluation.html to `args.results_dir`, and print the table.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: a flag or a file cannot be used. The message says what to do.
    """
    start_seconds, device = time.monotonic(), pick_device(args.device)
    args = replace(args, mixed_precision=resolve_precision(args.mixed_precision, device.type))
    pipe = None
    if not args.pictures:
        pipe = load_pipeline(args.pipeline_location, device, trust_remote_code=args.trust_remote_code)
    images = read_images(user_path(args.base_dir, args.pictures)) if args.pictures else []
    sizes_px = trained_sizes_px(pipe) if pipe else [(images[0].height, images[0].width)]
    photos = ComparedPhotos.load(args, pipe, sizes_px, device)
    labels, settings = None, {"pictures": Path(args.pictures or ".").name}
    if pipe:
        images, labels, settings = make_samples(args, pipe, photos)
    samples, training_pixels = as_array(images), photos.training_pixels()
    render = partial(vae_rendering, pipe.vae, precision=args.mixed_precision) if pipe else lambda part: part
    print(f"searching for copies of {len(training_pixels)} training photos in {len(samples)} samples", flush=True)
    finder = CopyFinder.of(training_pixels, render(training_pixels), device)
    nearest = finder.search(samples)  # in pixels, in features
    rendered = render(photos.pixels[photos.held_out])
    control_photos = None if photos.held_out == "all" else rendered.evenly_spaced(MAX_CONTROL_PHOTOS)
    planted = planted_copies(training_pixels.evenly_spaced(MAX_PLANTED).values[:])
    planted = reconstruct(pipe.vae, planted, args.mixed_precision) if pipe else planted

    print("comparing the samples with the photos", flush=True)
    results = settings | {
        "only_classes": photos.class_names if args.classes else None,
        "photos": {split: len(photos.files[split]) for split in photos.splits},
        "held_out": photos.held_out,
        "size_px": list(sizes_px[0]),
        "sizes_px": [list(size_px) for size_px in sizes_px],
        "features": photos.network.name,
    }
    results |= sample_scores(photos, samples, labels)
    results["copies"] = copy_fractions(finder, nearest, planted, control_photos)
    sheets = {
        "Samples": report.sample_sheet(samples, labels, photos.class_names),
        "Samples most like copies, in features": report.pair_sheet(samples, training_pixels.values, nearest[1]),
        "Samples most like copies, in pixels": report.pair_sheet(samples, training_pixels.values, nearest[0]),
    }
    if pipe:
        scores, sheet = vae_scores(photos, rendered)
        results["reconstruction"] = scores
        sheets |= sheet
    if pipe and isinstance(args.pipeline_location, Path):
        results |= weights_digests(args.pipeline_location)
        if photos.held_out != "all":
            results["held_out_trained_on"] = count_trained_on(args.pipeline_location, photos.files[photos.held_out])
    results["seconds"] = round(time.monotonic() - start_seconds, 1)
    files = [name for split in photos.training_splits for name in photos.files[split]]
    pixel_pairs, feature_pairs = (found.with_file_names(files) for found in nearest)
    results["nearest"] = {"pixels": pixel_pairs, "features": feature_pairs}  # one entry per sample, in order

    output_dir = args.results_dir
    write_json(output_dir / "evaluation.json", results)
    report.write_html(output_dir / "evaluation.html", results, sheets)
    print(report.table_text(results))
    print(
        f"numbers: {output_dir / 'evaluation.json'}\n"
        f"report with images: {output_dir / 'evaluation.html'} (it contains your photos)"
    )
    return results


def sample_scores(photos: ComparedPhotos, samples: Sequence[np.ndarray], labels: torch.Tensor | None) -> dict:
    """Return how close the samples are to the held-out photos, how diverse they are, and the scores of each class.

    Args:
        samples: uint8 (N, H, W, 3).
        labels: (N,) in the numbering of the photos, or None. Without labels there are no scores of classes.
    """
    features, held_out = extract(photos.network, samples), photos.held_out
    held_out_features = photos.features[held_out]
    all_images = [image for split in photos.splits for image in photos.pixels[split].evenly_spaced(MAX_COMPARED).values]
    results = {
        "generation": compare(
            features,
            held_out_features,
            labels_a=labels,
            labels_b=photo_labels_for_kid(photos.labels, held_out, labels),
        ),
        "halves": halves(*photos.subset("all")),
        "colours": {"pictures": colour_statistics(samples), "photos": colour_statistics(all_images)},
    }
    if held_out != "all":
        (train_features, train_labels), (subset_features, subset_labels) = (
            photos.subset("train"),
            photos.subset(held_out),
        )
        results["train_against_held_out"] = compare(
            train_features, subset_features, labels_a=train_labels, labels_b=subset_labels
        )
    if labels is None:
        of_photos = within_class_distance(photos.subset("all")[0], None)
    else:
        of_photos = within_class_distance(photos.features["all"], photos.labels["all"])
        of_split = {split: (photos.features[split], photos.labels[split]) for split in photos.features}
        results["classes"] = class_scores(
            photos.class_names,
            (features, labels),
            of_split["train"],
            of_split["all"],
            of_split[held_out] if held_out != "all" else None,
        )
    results["diversity"] = {"pictures": within_class_distance(features, labels), "photos": of_photos}
    return results


def vae_scores(photos: ComparedPhotos, rendered: Pixels) -> tuple[dict, dict[str, Image.Image]]:
    """Return the scores of the VAE's reconstructions of the held-out photos, and a sheet of both.

    Args:
        rendered: the reconstructions of the held-out photos, in their order.
    """
    held_out = photos.held_out
    originals, reconstructions = photos.pixels[held_out].values, rendered.values
    scores = reconstruction_scores(
        reconstructions, originals, photos.network, photos.features[held_out], photos.labels[held_out]
    )
    title = "Photos" if held_out == "all" else "Held-out photos"
    return scores, {f"{title} and their VAE reconstructions": report.reconstruction_sheet(originals, reconstructions)}


def copy_fractions(
    finder: CopyFinder, nearest: tuple[Nearest, Nearest], planted: Sequence[np.ndarray], control_photos: Pixels | None
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
    args: Evaluate, pipe: DiffusionPipeline, photos: ComparedPhotos
) -> tuple[list[Image.Image], torch.Tensor | None, dict]:
    """Generate the samples to evaluate, with the classes and the image sizes of the held-out photos.

    Returns:
        The samples, their labels in the numbering of the photos (None if the model lacks a class of the photos), and
        the settings that they were generated with.
    """
    sampler, steps = set_sampler(pipe, args)
    rows = stratified_rows(photos.labels[photos.held_out], args.num_images)
    photo_sizes_px = photos.pixels[photos.held_out].sizes_px()
    rows = torch.tensor(sorted(rows.tolist(), key=photo_sizes_px.__getitem__))  # a batch of samples has one size
    model_labels, labels = labels_to_draw(pipe, photos.class_names, photos.labels[photos.held_out][rows])
    sizes_px = [photo_sizes_px[row] for row in rows]
    images = list(sample_images(pipe, args, model_labels, args.seed, sizes_px, num_inference_steps=steps))
    settings = {"pipeline": Path(args.pipeline_location).name, "sampler": sampler, "steps": steps, "seed": args.seed}
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
    """Return the labels of the photos for KID, or None if KID does not need them.

    A split is stratified, so KID needs its labels. All photos together are a random sample: KID needs their labels only
    if the samples have labels too.
    """
    return None if held_out == "all" and sample_labels is None else photo_labels[held_out]


def labels_to_draw(
    pipe: DiffusionPipeline, class_names: list[str], labels: torch.Tensor
) -> tuple[list[int] | None, torch.Tensor | None]:
    """Return a class for each sample: that of a photo that the samples are compared with.

    If the model lacks a class of the photos, all classes of the model are equally frequent.

    Args:
        pipe: the pipeline.
        class_names: the names of the classes of the photos.
        labels: the label of the photo of each sample.

    Returns:
        The labels in the numbering of the model (None if the model has no classes), and the same labels in the
        numbering of the photos (None if the model lacks a class of the photos).
    """
    model_label = {name: int(label) for label, name in (pipe.config.class_names or {}).items()}
    if not set(class_names) <= set(model_label):
        return labels_for_images(pipe, (), len(labels)), None
    return [model_label[class_names[label]] for label in labels.tolist()], labels
