"""Read what an evaluation compares: photos, a held-out split, and images of other programs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from diffusers import DiffusionPipeline
from PIL import Image

from corel_diffusers.config.checks import MIN_PHOTOS
from corel_diffusers.config.commands import Evaluate
from corel_diffusers.data.cache import digest
from corel_diffusers.data.decoding import PhotoError, fit_photo, open_photo
from corel_diffusers.data.mixed_sizes import MixedArray
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import Pixels, cache_pixels, evenly_spaced
from corel_diffusers.data.tree import list_tree
from corel_diffusers.evaluation.features import Network, load_network, photo_features
from corel_diffusers.evaluation.reconstruction import MAX_COMPARED
from corel_diffusers.files import UserError, read_json


@dataclass
class ComparedPhotos:
    """The photos that an evaluation compares with, by split. "all" stands for the photos of all splits together."""

    class_names: list[str]
    network: Network
    held_out: str  # the split that the samples are compared with, or "all"
    training_splits: list[str]  # the splits whose photos the model may have seen
    pixels: dict[str, Pixels]  # it has the key "all" only if held_out is "all"
    files: dict[str, list[str]]
    labels: dict[str, torch.Tensor]  # (N,)
    features: dict[str, torch.Tensor]  # (N, D)

    @classmethod
    def load(
        cls,
        args: Evaluate,
        pipe: DiffusionPipeline | None,
        sizes_px: list[tuple[int, int]],
        device: torch.device,
    ) -> "ComparedPhotos":
        """Load the photos of the flags and extract their features.

        Args:
            pipe: the pipeline of the samples, or None for --pictures.
            sizes_px: the sizes (height, width) of the samples.

        Raises:
            UserError: the photos cannot be loaded, or there are too few to compare with.
        """
        grey = pipe is not None and pipe.vae.config.in_channels == 1
        photos = photos_to_compare(args, pipe)
        photos, pixels = cache_pixels(photos, sizes_px[0], more_sizes_px=sizes_px[1:], grey=grey)
        held_out = pick_held_out(args.against, pixels)
        # The training photos of --pictures are unknown: train and validation count as them, unless they are held out.
        training_splits = ["train"] if pipe else [split for split in ("train", "validation") if split != held_out]
        network = load_network(args.features, device)
        labels = {split: torch.tensor(part["label"][:]) for split, part in photos.items()}
        features = {split: photo_features(network, part) for split, part in pixels.items()}
        for by_split in (labels, features):
            by_split["all"] = torch.cat(list(by_split.values()))
        if held_out == "all":
            pixels = pixels | {"all": concatenate_pixels(list(pixels.values()))}
        files = {split: part["file_name"][:] for split, part in photos.items()}
        class_names = photos["train"].features["label"].names
        return cls(class_names, network, held_out, training_splits, pixels, files, labels, features)

    @property
    def splits(self) -> list[str]:
        """The names of the splits, without "all"."""
        return list(self.files)

    def training_pixels(self) -> Pixels:
        """Return the photos that the model may have seen."""
        parts = [self.pixels[split] for split in self.training_splits]
        return parts[0] if len(parts) == 1 else concatenate_pixels(parts)

    def subset(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features (N, D) and labels (N,) of at most MAX_COMPARED photos of each split, evenly spaced."""
        rows = {name: evenly_spaced(len(self.labels[name]), MAX_COMPARED) for name in self.splits}
        chosen = self.splits if split == "all" else [split]
        return (
            torch.cat([self.features[name][rows[name]] for name in chosen]),
            torch.cat([self.labels[name][rows[name]] for name in chosen]),
        )


def read_images(folder: Path) -> list[Image.Image]:
    """Read all images in a folder and its subfolders, sorted by path, and resize them to the size of the first one.

    Raises:
        UserError: an image cannot be read, or there are fewer than MIN_PHOTOS.
    """
    images = []
    for file in list_tree(folder, "--pictures").photos.values():
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


def photos_to_compare(args: Evaluate, pipe: DiffusionPipeline | None) -> DatasetDict:
    """Load the photos of --classes. Without that flag, load the photos of the classes that the model has."""
    if args.classes or not pipe:
        return load_photos(args.photo_source, classes=args.classes)
    return photos_of_model(args.photo_source, pipe, args.pipeline_location)


def photos_of_model(source: str | Path, pipe: DiffusionPipeline, location: str | Path) -> DatasetDict:
    """Load the photos of the classes that a pipeline has.

    All photos are loaded if the classes of the model are not a proper subset of the classes of the photos.

    Args:
        source: see `load_photos`.
        location: the folder or the Hub id of the pipeline.
    """
    photos = load_photos(source)
    trained_classes = set((pipe.config.class_names or {}).values())
    run_file = Path(location) / "run.json"
    if not trained_classes and run_file.is_file():  # a model that was trained on one class has no labels
        trained_classes = set(read_json(run_file)["data"]["classes"])
    if trained_classes and trained_classes < set(photos["train"].features["label"].names):
        return load_photos(source, classes=sorted(trained_classes))
    return photos


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
            f"the split {split} of --data-dir has only {count} photos, at least {MIN_PHOTOS} are needed: "
            "give --against all"
        )
    return split


def concatenate_pixels(parts: list[Pixels]) -> Pixels:
    """Return the photos of several splits as one Pixels."""
    key = digest([part.key for part in parts])
    if len({one_size.values.shape[1:] for part in parts for _, one_size in part.by_size()}) == 1:
        return Pixels(np.concatenate([part.values for part in parts]), key)
    arrays, offset = [], 0
    for part in parts:
        arrays += [(offset + rows, one_size.values) for rows, one_size in part.by_size()]
        offset += len(part)
    return Pixels(MixedArray.of(arrays), key)
