"""What does `evaluate` read where the samples are perfect, and does its interval hold what it should?

python benchmarks/perfect.py --data-dir photos scenes

Real photos play the samples: of each class some are held out at random, and others, as many of each class as `evaluate` would draw, stand
in for pictures of a model that nothing can be told from. Ten such draws at the sizes of `evaluate` and of `--evaluate-every`; KID should be
0 within its interval. Beside it the same draws counted as if the pictures of all classes had been drawn at random.

Then the coverage of the interval: the photos, and the same photos blurred, are populations whose distance is known; pictures are drawn from
both, with replacement and in fixed numbers per class, 400 times.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import machine
from PIL import Image, ImageFilter

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.evaluation.evaluate import as_often, joined
from corel_diffusers.evaluation.features import as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.metrics import kernel, kernel_distance, kernel_interval

SETTINGS = {"evaluate": (300, 1 / 6), "--evaluate-every": (48, 1 / 10)}  # samples, share of each class that is held out


def per_class(labels: np.ndarray, counts: np.ndarray, random: np.random.Generator, replace: bool = False) -> np.ndarray:
    """So many places of each class, at random."""
    return np.concatenate([random.choice(np.flatnonzero(labels == label), count, replace) for label, count in enumerate(counts)])


def numbers(labels: np.ndarray, samples: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """How many photos of each class play the samples, and how many are held out."""
    there = np.bincount(labels)
    held_out = np.maximum(1, np.round(share * there).astype(int))
    like = as_often(torch.arange(len(there)).repeat_interleave(torch.from_numpy(held_out)), samples).numpy()
    return np.minimum(np.bincount(like, minlength=len(there)), there - held_out), held_out


def perfect_row(name: str, setting: str, features: torch.Tensor, labels: np.ndarray, draws: int) -> str:
    """Draws of real photos as samples, none of them both a sample and held out."""
    samples, held_out = numbers(labels, *SETTINGS[setting])
    found, at_random, inside = [], [], 0
    for seed in range(draws):
        random = np.random.default_rng(seed)
        b = per_class(labels, held_out, random)
        rest = np.setdiff1d(np.arange(len(labels)), b)
        a = rest[per_class(labels[rest], samples, random)]
        of_both = {"labels_a": torch.from_numpy(labels[a]), "labels_b": torch.from_numpy(labels[b])}
        found.append(1e3 * kernel_distance(features[a], features[b], **of_both))
        low, high = kernel_interval(features[a], features[b], **of_both)
        inside += low <= 0 <= high
        at_random.append(1e3 * kernel_distance(features[a], features[b]))
    error, before = np.std(found) / draws**0.5, np.std(at_random) / draws**0.5
    return (
        f"| {name} | {setting} | {len(a)} / {len(b)} | {np.mean(found):.2f} ± {error:.2f} | {min(found):.1f} to {max(found):.1f} "
        f"| {inside} of {draws} | {np.mean(at_random):.2f} ± {before:.2f} |"
    )


def coverage_row(name: str, pictures: torch.Tensor, photos: torch.Tensor, labels: np.ndarray, setting: str, draws: int) -> str:
    """How often the interval holds the distance of the two populations, classes counting as they do among the held-out photos."""
    samples, held_out = numbers(labels, *SETTINGS[setting])
    weights = torch.from_numpy((held_out / held_out.sum() / np.bincount(labels))[labels])
    mixed = kernel(pictures, pictures) + kernel(photos, photos) - 2 * kernel(pictures, photos)
    truth, random, inside, values, widths = float(weights @ mixed @ weights), np.random.default_rng(0), 0, [], []
    for _ in range(draws):
        a, b = (per_class(labels, counts, random, replace=True) for counts in (samples, held_out))
        of_both = {"labels_a": torch.from_numpy(labels[a]), "labels_b": torch.from_numpy(labels[b])}
        low, high = kernel_interval(pictures[a], photos[b], **of_both)
        values.append(kernel_distance(pictures[a], photos[b], **of_both))
        inside += low <= truth <= high
        widths.append(high - low)
    return (
        f"| {name} | {len(a)} / {len(b)} | {1e3 * truth:.1f} | {1e3 * np.mean(values):.1f} ± {1e3 * np.std(values) / draws**0.5:.1f} "
        f"| {inside / draws:.1%} | {np.mean(widths) / (3.92 * np.std(values)):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", nargs="+", default=["scenes"], help="folders of photos, or scenes")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--coverage-draws", type=int, default=400)
    args = parser.parse_args()
    network, perfect, coverage = load_network("efficientnet-lite0", torch.device("cpu")), [], []
    for source in args.data_dir:
        photos, pixels = cache_pixels(load_photos(source if source == "scenes" else Path(source)), (args.image_size,) * 2)
        labels, name = np.concatenate([part["label"][:] for part in photos.values()]), Path(source).name
        features = torch.cat([photo_features(network, part) for part in pixels.values()])
        populations = {f"{name}, alike": features}
        for title, radius_px in {"a little blurred": 0.5, "blurred": 1.0}.items():
            blur = ImageFilter.GaussianBlur(radius_px * args.image_size / 64)
            blurred = as_array([Image.fromarray(photo).filter(blur) for photo in joined(list(pixels.values())).values])
            populations[f"{name}, {title}"] = extract(network, blurred)
        for setting in SETTINGS:
            perfect.append(perfect_row(name, setting, features, labels, args.draws))
            coverage += [coverage_row(title, made, features, labels, setting, args.coverage_draws) for title, made in populations.items()]
    print(f"{machine('cpu')}, features: {network.name}\n")
    print("| photos | as | n | KID x1000, mean ± standard error | lowest to highest | intervals with 0 | as if drawn at random |")
    print("|---|---|---|---|---|---|---|", *perfect, sep="\n")
    print("\n| populations | n | true KID x1000 | mean ± standard error | 95 % intervals that hold it | width over the true one |")
    print("|---|---|---|---|---|---|", *coverage, sep="\n")


if __name__ == "__main__":
    main()
