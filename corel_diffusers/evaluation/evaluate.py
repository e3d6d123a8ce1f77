"""`corel-diffusers evaluate`: photos and pictures -> features -> numbers -> a table, evaluation.json, evaluation.html."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from corel_diffusers.cli import Evaluate
from corel_diffusers.data.cache import cached_array, digest
from corel_diffusers.data.photos import PHOTO_ENDINGS, load_photos
from corel_diffusers.data.transforms import PhotoError, Pixels, cache_pixels, evenly, fit_photo, open_photo, to_float
from corel_diffusers.evaluation import report
from corel_diffusers.evaluation.features import Network, as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.memorization import PIXEL_RATIO, CopyFinder, planted_copies
from corel_diffusers.evaluation.metrics import class_match, colour_statistics, compare, halves, kernel_distance, within_class_distance
from corel_diffusers.files import UserError, read_json, write_json
from corel_diffusers.generate import (
    build_sampler,
    guidance_interval,
    load_pipeline,
    pick_device,
    pick_labels,
    pick_sampler,
    picture_size_px,
    possible_steps,
    sample_pictures,
)
from corel_diffusers.hub import pipeline_digest, write_card
from corel_diffusers.latents import config_key, weights_key
from corel_diffusers.perceptual import PerceptualLoss
from corel_diffusers.plots import to_pictures
from corel_diffusers.precision import arithmetic, autocast, resolve_precision
from corel_diffusers.training import trained_on

FEWEST = 4  # photos on either side; with fewer, no distance means anything
POOR_PSNR_DB, POOR_KID_E3 = 22.0, 40.0  # at 64 px: faces and small things are gone below the one or surely above the other
LOOKED_AT = 1000  # photos of a split, at most, where more would hardly change a number: kernels grow with their square
SEARCHED = 500  # held-out photos, at most, that are searched for as if they were copies
PLANTED = 200  # training photos that are reconstructed and searched for, to see whether copies are found


def evaluate(args: Evaluate, source: Path | str, output_dir: Path) -> None:
    """Writes evaluation.json and evaluation.html to `output_dir` and prints the table. Raises UserError with the way out."""
    began, device = time.monotonic(), pick_device(args.device)
    args.mixed_precision = resolve_precision(args.mixed_precision, device.type)
    pipe = None if args.pictures else load_pipeline(args.pipeline, device)
    pictures = read_pictures(Path(args.base_dir) / args.pictures) if args.pictures else []
    size_px = picture_size_px(pipe) if pipe else (pictures[0].height, pictures[0].width)
    photos, pixels = cache_pixels(photos_to_compare(args, source, pipe), size_px)
    class_names = photos["train"].features["label"].names
    photo_labels = {split: torch.tensor(part["label"][:]) for split, part in photos.items()}
    held_out = pick_held_out(args.against, pixels)
    searched = ["train"] if pipe else [split for split in ("train", "validation") if split != held_out]
    known = pixels["train"] if pipe else joined([pixels[split] for split in searched])
    network = load_network(args.features, device)
    real = {split: photo_features(network, part) for split, part in pixels.items()}
    some = {split: features[evenly(len(features), LOOKED_AT)] for split, features in real.items()}
    some_labels = {split: labels[evenly(len(labels), LOOKED_AT)] for split, labels in photo_labels.items()}
    colours = colour_statistics(joined([part.evenly(LOOKED_AT) for part in pixels.values()]).values)
    for parts in (real, some, photo_labels, some_labels):
        parts["all"] = torch.cat(list(parts.values()))
    if held_out == "all":
        pixels["all"] = joined(list(pixels.values()))

    labels, settings = None, {"pictures": Path(args.pictures or ".").name}
    if pipe:
        pictures, labels, settings = make_pictures(args, pipe, class_names, photo_labels[held_out])
    values = as_array(pictures)
    features = extract(network, values)
    as_rendered = partial(render, pipe.vae, precision=args.mixed_precision) if pipe else lambda part: part
    finder = CopyFinder.of(known, as_rendered(known), device)
    in_pixels, in_features = finder.search(values)

    results = settings | {
        "only_classes": class_names if args.classes else None,
        "photos": {split: len(part) for split, part in photos.items()},
        "held_out": held_out,
        "size_px": list(size_px),
        "features": network.name,
        "generation": compare(features, real[held_out], labels_a=labels, labels_b=drawn_labels(photo_labels, held_out, labels)),
        "halves": halves(some["all"], some_labels["all"]),
        "colours": {"pictures": colour_statistics(values), "photos": colours},
        "copies": {"pixel_ratio": PIXEL_RATIO, "feature_ratio": finder.feature_ratio, "features": finder.network.name},
    }
    results["copies"]["pictures"] = finder.shares(in_pixels, in_features)
    planted = planted_copies(known.evenly(PLANTED).values[:])
    planted = reconstruct(pipe.vae, planted, args.mixed_precision) if pipe else planted
    results["copies"]["planted"] = finder.shares(*finder.search(planted))
    results["copies"]["n"] = {"pictures": len(values)}
    if held_out != "all":
        train_labels = {"labels_a": some_labels["train"], "labels_b": some_labels[held_out]}
        results["train_against_held_out"] = compare(some["train"], some[held_out], **train_labels)
        searched_for = as_rendered(pixels[held_out]).evenly(SEARCHED).values[:]
        results["copies"]["held_out"] = finder.shares(*finder.search(searched_for))
        results["copies"]["n"]["held_out"] = len(searched_for)
    if labels is None:
        results["diversity"] = {"pictures": within_class_distance(features, None), "photos": within_class_distance(some["all"], None)}
    else:
        made, real_of = (features, labels), {split: (real[split], photo_labels[split]) for split in real}
        results["diversity"] = {"pictures": within_class_distance(*made), "photos": within_class_distance(*real_of["all"])}
        others = real_of[held_out] if held_out != "all" else None
        results["classes"] = class_scores(class_names, made, real_of["train"], real_of["all"], others)
    sheets = {
        "Pictures": report.sample_sheet(values, labels, class_names),
        "Nearest in features": report.pair_sheet(values, known.values, in_features),
        "Nearest in pixels": report.pair_sheet(values, known.values, in_pixels),
    }
    if pipe:
        originals, rendered = pixels[held_out].values, as_rendered(pixels[held_out]).values
        results["reconstruction"] = reconstruction_scores(rendered, originals, network, real[held_out], photo_labels[held_out])
        whose = "Photos" if held_out == "all" else "Held-out photos"
        sheets[f"{whose} over their reconstructions"] = report.reconstruction_sheet(originals, rendered)
    if isinstance(args.pipeline, Path) and pipe:
        results["unet_sha256"] = pipeline_digest(args.pipeline)
        if held_out != "all":
            results["held_out_trained_on"] = trained_on(args.pipeline, photos[held_out]["file_name"][:])
    results["seconds"] = round(time.monotonic() - began, 1)
    files = [name for split in searched for name in photos[split]["file_name"][:]]
    results["nearest"] = {"pixels": in_pixels.named(files), "features": in_features.named(files)}  # of each picture, in order

    write_json(output_dir / "evaluation.json", results)
    if output_dir == args.pipeline:
        write_card(output_dir)
    report.write_html(output_dir / "evaluation.html", results, sheets)
    print(report.table_text(results))
    print(f"numbers: {output_dir / 'evaluation.json'}\npictures: {output_dir / 'evaluation.html'} (it shows your photos)")


def make_pictures(
    args: Evaluate, pipe: DiffusionPipeline, class_names: list[str], photo_labels: torch.Tensor
) -> tuple[list[Image.Image], torch.Tensor | None, dict]:
    """The pictures to judge, their labels in the photos' numbers (None where those do not fit), and how they were made."""
    sampler, steps = pick_sampler(args)
    pipe.scheduler = build_sampler(sampler, pipe.scheduler)
    steps = possible_steps(pipe.scheduler, steps)
    labels, like_photos = labels_to_draw(pipe, class_names, photo_labels, args.num_images)
    pictures = list(sample_pictures(pipe, args, labels, args.seed, num_inference_steps=steps))
    settings = {"pipeline": Path(args.pipeline).name, "sampler": sampler, "steps": steps, "seed": args.seed}
    guide = getattr(pipe, "guide", None) is not None  # pipelines of an earlier version have none
    settings |= {
        "mixed_precision": args.mixed_precision,
        "guidance_scale": args.guidance_scale if guide or labels else 1.0,  # by nothing where there is neither
        "guidance_interval": guidance_interval(args, pipe),
        "guide": guide,
    }
    return pictures, like_photos, settings


def drawn_labels(photo_labels: dict[str, torch.Tensor], held_out: str, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The labels that KID has to know of the photos it compares with: of a split, whose classes come in fixed numbers, or beside pictures
    with labels. All photos beside pictures without count as drawn at random."""
    return None if held_out == "all" and labels is None else photo_labels[held_out]


def labels_to_draw(
    pipe: DiffusionPipeline, class_names: list[str], photo_labels: torch.Tensor, count: int
) -> tuple[list[int] | None, torch.Tensor | None]:
    """A class for each picture, as the model numbers it and as the photos do: each as often among the pictures as among the photos that
    they are compared with. Where the model lacks one of the photos' classes: all of its own alike, and none of theirs."""
    numbers = {name: int(number) for number, name in (pipe.config.class_names or {}).items()}
    if not set(class_names) <= set(numbers):
        return pick_labels(pipe, (), count), None
    like_photos = as_often(photo_labels, count)
    return [numbers[class_names[label]] for label in like_photos.tolist()], like_photos


def as_often(labels: torch.Tensor, count: int) -> torch.Tensor:
    """So many labels, each as often as it is among `labels`, sorted."""
    return labels.sort().values[torch.arange(count) * len(labels) // count]


@dataclass
class SampleJudge:
    """What a few samples are judged with while a model trains: the held-out photos' features, and the training photos."""

    network: Network
    held_out: torch.Tensor
    labels: torch.Tensor  # of the held-out photos
    finder: CopyFinder

    @classmethod
    def of(cls, vae: AutoencoderKL, pixels: dict[str, Pixels], labels: np.ndarray, precision: str) -> "SampleJudge":
        """precision: of the passes that the samples are drawn in. labels: of the validation photos."""
        network = load_network("efficientnet-lite0", vae.device)
        finder = CopyFinder.of(pixels["train"], render(vae, pixels["train"], precision), vae.device)
        return cls(network, photo_features(network, pixels["validation"]), torch.from_numpy(labels), finder)

    def labels_to_draw(self, count: int) -> torch.Tensor:
        """A label for each sample, each as often as among the held-out photos: (count,)."""
        return as_often(self.labels, count)

    def scores(self, pictures: list[Image.Image], labels: torch.Tensor | None) -> dict[str, float]:
        """KID x1000 against the held-out photos, where there are enough, and the shares of copies; few pictures make it noisy, the trend
        counts. labels: of the pictures, None where the model has no classes."""
        values = as_array(pictures)
        features = extract(self.network, values)
        copies = {f"copies_{name}": share for name, share in self.finder.shares(*self.finder.search(values)).items()}
        enough = len(self.held_out) >= FEWEST
        kid = kernel_distance(features, self.held_out, labels_a=labels, labels_b=self.labels) if enough else None
        return copies if kid is None else {"kid_e3": 1e3 * kid} | copies


def reconstruction_limit(vae: AutoencoderKL, held_out: Pixels, labels: torch.Tensor | None = None, precision: str = "no") -> str:
    """One line on what the VAE's held-out reconstruction allows at best, with a warning where that is poor. labels: of the held-out photos.
    precision: what samples will be decoded in."""
    if len(held_out) < FEWEST:
        return f"the VAE was not measured: {len(held_out)} held-out photos are too few"
    network, held_out = load_network("efficientnet-lite0", vae.device), held_out.evenly(LOOKED_AT)
    labels = None if labels is None else labels[evenly(len(labels), LOOKED_AT)]
    made = reconstruct(vae, held_out.values, precision)
    scores = reconstruction_scores(made, held_out.values, network, photo_features(network, held_out), labels)
    kid = f"KID x1000 {report.with_interval(scores)} ({network.name})"
    line = (
        f"the VAE brings held-out photos back at PSNR {scores['psnr_db']:.1f} dB, {kid}: samples will not come nearer to photos than that"
    )
    poor = scores["psnr_db"] < POOR_PSNR_DB or (scores["kid_e3_low"] or 0.0) > POOR_KID_E3
    return line + ("; that is poor: train the VAE longer first" if poor else "")


def read_pictures(folder: Path) -> list[Image.Image]:
    """Every picture below a folder, sorted by name, at the first one's size."""
    pictures = []
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in PHOTO_ENDINGS and not file.name.startswith(".")):
        try:
            pictures.append(open_photo(file))
        except PhotoError as error:
            raise UserError(f"--pictures {folder}: {file.name} cannot be used ({error}): remove it") from None
    if len(pictures) < FEWEST:
        raise UserError(
            f"--pictures {folder} holds {len(pictures)} pictures: {FEWEST} or more are needed, some hundred to trust the numbers"
        )
    return [picture if picture.size == pictures[0].size else fit_photo(picture, pictures[0].size[::-1]) for picture in pictures]


def photos_to_compare(args: Evaluate, source: Path | str, pipe: DiffusionPipeline | None) -> DatasetDict:
    """The photos of --classes, or of the classes that the model has, or all where its classes are not the photos'."""
    photos = load_photos(source, classes=args.classes)
    if args.classes or not pipe:
        return photos
    trained = set((pipe.config.class_names or {}).values())
    run = Path(args.pipeline) / "run.json"
    if not trained and run.is_file():  # a model of one class has no labels
        trained = set(read_json(run)["data"]["classes"])
    return load_photos(source, classes=sorted(trained)) if trained and trained < set(photos["train"].features["label"].names) else photos


def pick_held_out(wanted: str, pixels: dict[str, Pixels]) -> str:
    """The split to compare with. Raises UserError where it is missing or too small."""
    split = ("test" if "test" in pixels else "validation") if wanted == "auto" else wanted
    if split not in {*pixels, "all"}:
        raise UserError(
            f"--against {split}: no photos were set aside as test: run prepare with --test-fraction 0.15, or leave the flag out"
        )
    count = sum(map(len, pixels.values())) if split == "all" else len(pixels[split])
    if count < FEWEST:
        raise UserError(f"--data-dir has {count} photos in {split} to compare with, {FEWEST} or more are needed: give --against all")
    return split


def joined(parts: list[Pixels]) -> Pixels:
    """The photos of several splits."""
    return Pixels(np.concatenate([part.values for part in parts]), digest([part.key for part in parts]))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, photos: np.ndarray, precision: str = "no") -> np.ndarray:
    """uint8 (N, H, W, 3) -> what the VAE makes of it, through the posterior's mean, uint8 of the same shape.

    Encoded as the UNet's training photos are, and decoded in the precision that samples are decoded in: what is compared with them
    must not differ by its rounding.
    """
    made = []
    decoding = "no" if vae.config.force_upcast else precision  # as the pipeline decodes
    for start in range(0, len(photos), 32):
        part = to_float(torch.from_numpy(np.array(photos[start : start + 32]))).to(vae.device, vae.dtype)
        with autocast("no", vae.device.type):
            latents = vae.encode(part).latent_dist.mean
        with autocast(decoding, vae.device.type):
            made += to_pictures(vae.decode(latents).sample)
    return as_array(made)


def render(vae: AutoencoderKL, pixels: Pixels, precision: str = "no") -> Pixels:
    """The photos of a split as the VAE renders them in that precision: computed once, cached by what the photos hold, the VAE's weights and
    config, and the arithmetic."""
    vae_key = f"{weights_key(vae)}-{config_key(vae)}-{arithmetic(vae.device)}-{precision}"
    key = f"{pixels.key}-{len(pixels)}-{vae_key}"

    def make(photos: slice) -> np.ndarray:
        return reconstruct(vae, pixels.values[photos], precision)

    return Pixels(cached_array(key, pixels.values.shape, np.uint8, make, "rendering photos"), key)


def reconstruction_scores(
    made: np.ndarray, photos: np.ndarray, network: Network, real: torch.Tensor, labels: torch.Tensor | None = None
) -> dict[str, float | None]:
    """What the VAE loses: PSNR (dB), SSIM, perceptual distance, and its own distances, under which no sample set comes but by luck.

    real: the photos' features. labels: of the photos. A photo and its reconstruction are no pair that KID counts; `kid_e3_all_pairs`
    counts them too, and is too low for it.
    """
    perceptual, sums = PerceptualLoss("efficientnet-lite0").to(network.device), np.zeros(3)
    for start in range(0, len(made), 32):
        a, b = (to_float(torch.from_numpy(np.array(values[start : start + 32]))).to(network.device) for values in (made, photos))
        with torch.no_grad():
            far = perceptual(a, b)
        a, b = (a + 1) / 2, (b + 1) / 2
        near = peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3)), structural_similarity_index_measure(a, b, data_range=1.0)
        sums += [len(a) * float(value) for value in (*near, far)]
    features = extract(network, made)
    means = dict(zip(("psnr_db", "ssim", "perceptual"), (sums / len(made)).tolist(), strict=True))
    all_pairs = kernel_distance(features, real, labels_a=labels, labels_b=labels)
    distances = compare(features, real, True, labels, labels)
    return means | distances | {"kid_e3_all_pairs": None if all_pairs is None else 1e3 * all_pairs}


Labelled = tuple[torch.Tensor, torch.Tensor]  # features (N, D) and labels (N,)


def class_scores(
    class_names: list[str], pictures: Labelled, train: Labelled, photos: Labelled, held_out: Labelled | None
) -> dict[str, dict]:
    """For each class: its pictures beside its held-out photos, or beside all of its photos where FEWEST are not held out (`against` says
    which: photos that were trained on lower the distance of a model that repeats them); and how many are nearest to their own class's mean
    training photo, beside the same share of held-out photos, where there are any."""
    matches = class_match(*pictures, *train)
    real_matches = class_match(*held_out, *train) if held_out else None
    found = {}
    for label, name in enumerate(class_names):
        own, held = pictures[1] == label, held_out[1] == label if held_out else torch.zeros(0, dtype=torch.bool)
        enough = held.sum() >= FEWEST
        beside = held_out[0][held] if enough else photos[0][photos[1] == label]
        if own.sum() < 2 or len(beside) < 2:
            continue
        found[name] = compare(pictures[0][own], beside) | {
            "against": "held-out" if enough else "all",
            "match": float(matches[own].double().mean()),
            "match_photos": float(real_matches[held].double().mean()) if held.any() else None,
        }
    return found
