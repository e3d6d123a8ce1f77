"""Which KID does `evaluate` report for perfect samples, and how often does its interval contain the true value?

python benchmarks/perfect.py --data-dir photos scenes

Real photos stand in for the samples of a perfect model. In each class, some photos are held out at random. Other photos
of the class serve as samples, as many as `evaluate` would draw for this class. This is repeated ten times, at the sizes
of `evaluate` and of `--evaluate-every`. 0 should lie within the interval of the KID. For comparison, the last column
counts the same draws as if the samples of all classes had been drawn at random.

A second table measures the coverage of the interval. The photos and the same photos blurred are two populations with a
known distance. The script draws from both of them 400 times, with replacement and in fixed numbers per class.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import machine_name
from PIL import Image, ImageFilter

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.evaluation.features import as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.inputs import concatenate_pixels
from corel_diffusers.evaluation.judge import stratified_rows
from corel_diffusers.evaluation.kid import kernel, kernel_distance, kernel_interval

# name -> (number of samples, held-out fraction of each class)
SETTINGS = {"evaluate": (300, 1 / 6), "--evaluate-every": (48, 1 / 10)}


def random_per_class(
    labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator, replace: bool = False
) -> np.ndarray:
    """Return `counts[label]` random indices of each class."""
    return np.concatenate(
        [rng.choice(np.flatnonzero(labels == label), count, replace) for label, count in enumerate(counts)]
    )


def class_counts(labels: np.ndarray, num_samples: int, held_out_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of photos per class that serve as samples, and the number per class that are held out."""
    photo_counts = np.bincount(labels)
    held_out = np.maximum(1, np.round(held_out_fraction * photo_counts).astype(int))
    held_out_labels = torch.arange(len(photo_counts)).repeat_interleave(torch.from_numpy(held_out))
    sample_labels = held_out_labels[stratified_rows(held_out_labels, num_samples)].numpy()
    return np.minimum(np.bincount(sample_labels, minlength=len(photo_counts)), photo_counts - held_out), held_out


def perfect_row(name: str, setting: str, features: torch.Tensor, labels: np.ndarray, draws: int) -> str:
    """Return a row of the first table: KID of real photos that serve as samples.

    No photo is both a sample and held out.
    """
    sample_counts, held_out_counts = class_counts(labels, *SETTINGS[setting])
    kids, random_kids, hits = [], [], 0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        held_out_indices = random_per_class(labels, held_out_counts, rng)
        remaining = np.setdiff1d(np.arange(len(labels)), held_out_indices)
        sample_indices = remaining[random_per_class(labels[remaining], sample_counts, rng)]
        both_labels = {
            "labels_a": torch.from_numpy(labels[sample_indices]),
            "labels_b": torch.from_numpy(labels[held_out_indices]),
        }
        kids.append(1e3 * kernel_distance(features[sample_indices], features[held_out_indices], **both_labels))
        low, high = kernel_interval(features[sample_indices], features[held_out_indices], **both_labels)
        hits += low <= 0 <= high
        random_kids.append(1e3 * kernel_distance(features[sample_indices], features[held_out_indices]))
    kid_error, random_error = np.std(kids) / draws**0.5, np.std(random_kids) / draws**0.5
    return (
        f"| {name} | {setting} | {len(sample_indices)} / {len(held_out_indices)} "
        f"| {np.mean(kids):.2f} ± {kid_error:.2f} | {min(kids):.1f} to {max(kids):.1f} "
        f"| {hits} of {draws} | {np.mean(random_kids):.2f} ± {random_error:.2f} |"
    )


def coverage_row(
    name: str, sample_features: torch.Tensor, features: torch.Tensor, labels: np.ndarray, setting: str, draws: int
) -> str:
    """Return a row of the second table: how often the interval contains the distance of the two populations.

    In this distance, classes have the weights that they have among the held-out photos.
    """
    sample_counts, held_out_counts = class_counts(labels, *SETTINGS[setting])
    weights = torch.from_numpy((held_out_counts / held_out_counts.sum() / np.bincount(labels))[labels])
    kernel_sum = (
        kernel(sample_features, sample_features) + kernel(features, features) - 2 * kernel(sample_features, features)
    )
    true_distance, rng, hits, distances, widths = (
        float(weights @ kernel_sum @ weights),
        np.random.default_rng(0),
        0,
        [],
        [],
    )
    for _ in range(draws):
        sample_indices, held_out_indices = (
            random_per_class(labels, counts, rng, replace=True) for counts in (sample_counts, held_out_counts)
        )
        both_labels = {
            "labels_a": torch.from_numpy(labels[sample_indices]),
            "labels_b": torch.from_numpy(labels[held_out_indices]),
        }
        low, high = kernel_interval(sample_features[sample_indices], features[held_out_indices], **both_labels)
        distances.append(kernel_distance(sample_features[sample_indices], features[held_out_indices], **both_labels))
        hits += low <= true_distance <= high
        widths.append(high - low)
    return (
        f"| {name} | {len(sample_indices)} / {len(held_out_indices)} | {1e3 * true_distance:.1f} "
        f"| {1e3 * np.mean(distances):.1f} ± {1e3 * np.std(distances) / draws**0.5:.1f} "
        f"| {hits / draws:.1%} | {np.mean(widths) / (3.92 * np.std(distances)):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", nargs="+", default=["scenes"], help='folders of photos, or "scenes"')
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--coverage-draws", type=int, default=400)
    args = parser.parse_args()
    network, perfect_rows, coverage_rows = load_network("efficientnet-lite0", torch.device("cpu")), [], []
    for source in args.data_dir:
        photos, pixels = cache_pixels(
            load_photos(source if source == "scenes" else Path(source)), (args.image_size,) * 2
        )
        labels, name = np.concatenate([part["label"][:] for part in photos.values()]), Path(source).name
        features = torch.cat([photo_features(network, part) for part in pixels.values()])
        populations = {f"{name}, alike": features}
        for title, radius_px in {"a little blurred": 0.5, "blurred": 1.0}.items():
            blur = ImageFilter.GaussianBlur(radius_px * args.image_size / 64)
            blurred = as_array(
                [Image.fromarray(photo).filter(blur) for photo in concatenate_pixels(list(pixels.values())).values]
            )
            populations[f"{name}, {title}"] = extract(network, blurred)
        for setting in SETTINGS:
            perfect_rows.append(perfect_row(name, setting, features, labels, args.draws))
            coverage_rows += [
                coverage_row(title, sample_features, features, labels, setting, args.coverage_draws)
                for title, sample_features in populations.items()
            ]
    print(f"{machine_name('cpu')}, features: {network.name}\n")
    print(
        "| photos | setting | n | KID x1000, mean ± standard error | minimum to maximum "
        "| intervals with 0 | as if drawn at random |"
    )
    print("|---|---|---|---|---|---|---|", *perfect_rows, sep="\n")
    print(
        "\n| populations | n | true KID x1000 | mean ± standard error "
        "| 95 % intervals that contain it | width / true width |"
    )
    print("|---|---|---|---|---|---|", *coverage_rows, sep="\n")


if __name__ == "__main__":
    main()
