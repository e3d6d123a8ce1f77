"""Decode photos to RGB pixels, resize and crop them once into a uint8 cache, and read them as float batches."""

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

from corel_diffusers.data.aspect import SizePx, rows_by_size
from corel_diffusers.data.cache import SINGLE_PROCESS, ShardedArray, Share, cache_folder, cached_array, digest
from corel_diffusers.data.content_keys import content_key
from corel_diffusers.data.decoding import PhotoError, fit_photo, is_grey, open_photo
from corel_diffusers.data.mixed_sizes import MixedArray, join
from corel_diffusers.files import UserError, read_json, write_json

COLOURED, GREY, UNREADABLE = range(3)
CROP_SCALE = 2.5  # random crops are cut from photos of at most this many times the training size


@dataclass
class Pixels:
    """The decoded photos of one split: uint8 (N, H, W, 3) on disk or in memory, and a key for their content.

    Photos of several image sizes are a MixedArray of such arrays.
    """

    values: ShardedArray | np.ndarray | MixedArray
    key: str

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: np.ndarray | slice) -> torch.Tensor:
        """Return photos of one size as float32 (B, 3, H, W) in [-1, 1], in channels-last memory format."""
        return to_float(torch.from_numpy(self.values[indices]))

    def by_size(self) -> list[tuple[np.ndarray, "Pixels"]]:
        """Return the photos of each image size: their indices, and their Pixels."""
        if not isinstance(self.values, MixedArray):
            return [(np.arange(len(self)), self)]
        return [
            (photos, Pixels(self.values[photos] if len(photos) < len(part) else part, f"{self.key}-{number}"))
            for number, (part, photos) in enumerate(zip(self.values.parts, self.values.photos_by_part(), strict=True))
            if len(photos)
        ]

    def sizes_px(self) -> list[tuple[int, int]]:
        """Return the (height, width) of each photo."""
        sizes_px = [(0, 0)] * len(self)
        for rows, part in self.by_size():
            for row in rows:
                sizes_px[row] = tuple(part.values.shape[1:3])
        return sizes_px

    def count_by_size(self) -> dict[str, int] | None:
        """Return "<height>x<width>" -> number of photos. None if there is one size."""
        counts = {"{}x{}".format(*part.values.shape[1:3]): len(part) for _, part in self.by_size()}
        return counts if len(counts) > 1 else None

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield batches of photos of one size: their indices, and the result of `batch`."""
        for photos, part in self.by_size():
            for start in range(0, len(part), batch_size):
                yield photos[start : start + batch_size], part.batch(slice(start, start + batch_size))

    def evenly_spaced(self, at_most: int) -> "Pixels":
        """Return at most `at_most` of the photos, evenly spaced."""
        if len(self) <= at_most:
            return self
        chosen = evenly_spaced(len(self), at_most)
        is_mixed = isinstance(self.values, MixedArray)
        return Pixels(self.values.select(chosen) if is_mixed else self.values[chosen], f"{self.key}-evenly-{at_most}")


def evenly_spaced(count: int, at_most: int) -> np.ndarray:
    """Return at most `at_most` evenly spaced indices below `count`.

    Photos of a folder are usually sorted by class, so evenly spaced photos come from many classes.
    """
    return np.linspace(0, count - 1, min(count, at_most)).astype(int)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def cache_pixels(
    photos: DatasetDict,
    size_px: SizePx,
    share: Share = SINGLE_PROCESS,
    more_sizes_px: Sequence[SizePx] = (),
    grey: bool = False,
    factor: float = 1.0,
) -> tuple[DatasetDict, dict[str, Pixels]]:
    """Decode, resize and crop each photo once, and cache the pixels.

    The key of the cache depends on `content_key`, on the size in pixels and on `grey`. If one of them changes, the
    photos are decoded again.

    Args:
        photos: the photos of all splits.
        size_px: the (height, width) of the pixels.
        share: the place of this process among those that fill the cache.
        more_sizes_px: sizes for photos that keep more of their area in them than in `size_px`.
        grey: convert the photos to grey. They still have three channels, which are equal.
        factor: multiply the sizes by this number.

    Returns:
        The photos without the unreadable ones, and the Pixels of each split. One printed line names the unreadable
        photos.
    """
    kept, pixels, bad = {}, {}, []
    for split, part in photos.items():
        parts, is_good = [], np.ones(len(part), bool)
        for base_size_px, rows in rows_by_size(part, (size_px, *more_sizes_px), share):
            scaled_px = tuple(round(factor * side) for side in base_size_px)
            one_size = part if len(rows) == len(part) else part.select(rows)
            decoded, reasons = decode_split(one_size, scaled_px, share, grey)
            is_good[rows[list(reasons)]] = False
            bad += [f"{one_size['file_name'][index]}: {reason}" for index, reason in reasons.items()]
            good = [index for index in range(len(one_size)) if index not in reasons]
            if good:
                parts.append((rows[good], without_unreadable(decoded, good) if reasons else decoded))
        if not parts:
            raise UserError(f"no photo of the {split} split can be read: {'; '.join(bad[:3])}")
        kept[split] = part.select(np.flatnonzero(is_good))
        places = np.cumsum(is_good) - 1  # of the readable photos among each other
        values = join([(places[rows], decoded.values) for rows, decoded in parts])
        key = (
            parts[0][1].key
            if len(parts) == 1
            else "pixels-" + digest([(decoded.key, rows.tolist()) for rows, decoded in parts])
        )
        pixels[split] = Pixels(values, key)
    if bad:
        refuse_lost_classes(photos, kept, bad)
        print(f"{len(bad)} photos cannot be read and are left out: {'; '.join(bad[:5])}{' …' if len(bad) > 5 else ''}")
    return DatasetDict(kept), pixels


def refuse_lost_classes(photos: DatasetDict, kept: dict[str, Dataset], reasons: list[str]) -> None:
    """Raise UserError if no photo of a class can be read. reasons: "name: reason" of the unreadable photos."""
    before, after = ({label for part in parts.values() for label in part["label"][:]} for parts in (photos, kept))
    if lost := before - after:
        name = photos["train"].features["label"].int2str(min(lost))
        raise UserError(
            f"no photo of the class {name} can be read ({'; '.join(reasons[:3])}): "
            "repair its photos, or train without this class (--classes)"
        )


def without_unreadable(pixels: Pixels, good: list[int]) -> Pixels:
    """Return the Pixels of the readable photos of a split. They are cached on disk too."""
    key, shape = f"{pixels.key}-{digest(good)}", (len(good), *pixels.values.shape[1:])
    return Pixels(
        cached_array(key, shape, np.uint8, lambda photos: pixels.values[good[photos]], "dropping unreadable photos"),
        key,
    )


def cache_large_pixels(
    photos: DatasetDict,
    size_px: SizePx,
    share: Share = SINGLE_PROCESS,
    more_sizes_px: Sequence[SizePx] = (),
    grey: bool = False,
) -> Pixels:
    """Return the training photos with more pixels than `size_px`, for random crops.

    The size is `size_px` times CROP_SCALE, or less if a typical photo has fewer pixels, but never less than `size_px`.
    See `cache_pixels` for the arguments.
    """
    factor = min(CROP_SCALE, max(1.0, native_side_px(photos) / min(size_px)))
    kept, pixels = cache_pixels(DatasetDict(train=photos["train"]), size_px, share, more_sizes_px, grey, factor)
    if len(kept["train"]) < len(photos["train"]):
        raise UserError(
            "--data-dir: some photos that could be read before cannot be read now: "
            "check that the disk is connected, then start again"
        )
    return pixels["train"]


def are_grey(photos: DatasetDict, share: Share = SINGLE_PROCESS) -> bool:
    """Return whether all photos are grey. Unreadable photos do not count.

    A few evenly spaced photos are opened first. Only if they are grey, all photos are, and the result is cached.
    """
    parts = [part.cast_column("image", ImageFeature(decode=False)) for part in photos.values()]
    for part in parts:
        chosen = part.select(evenly_spaced(len(part), 16))["image"]
        if any(kind_of_colours(row) == COLOURED for row in chosen):
            return False
    kinds = []
    for part in parts:
        rows = part["image"]

        def kinds_of(chosen: slice, rows: Sequence[dict] = rows) -> np.ndarray:
            with ThreadPoolExecutor() as pool:
                found = pool.map(kind_of_colours, (rows[index] for index in range(chosen.start, chosen.stop)))
                return np.array(list(found), np.uint8)

        key = "grey-" + digest(content_key(part, rows))
        kinds.append(cached_array(key, (len(rows),), np.uint8, kinds_of, "looking for colours", share)[:])
    found = set(np.concatenate(kinds).tolist())
    return GREY in found and COLOURED not in found


def kind_of_colours(row: dict) -> int:
    """Return COLOURED, GREY or UNREADABLE for a photo that is not decoded yet."""
    try:
        return GREY if is_grey(open_photo(row["bytes"] or row["path"])) else COLOURED
    except PhotoError:  # `cache_pixels` reports it
        return UNREADABLE


def a_few_photos(part: Dataset, max_opened: int = 16) -> Iterator[Image.Image]:
    """Open evenly spaced photos, one after the other. Unreadable ones are left out: `cache_pixels` reports them."""
    chosen = part.select(evenly_spaced(len(part), max_opened)).cast_column("image", ImageFeature(decode=False))
    for row in chosen["image"]:
        with suppress(PhotoError):
            yield open_photo(row["bytes"] or row["path"])


def native_side_px(photos: DatasetDict) -> float:
    """Return the shorter side of a typical training photo in pixels: the median of a few photos."""
    sides = [min(photo.size) for photo in a_few_photos(photos["train"])]
    return statistics.median(sides) if sides else 0


def decode_split(part: Dataset, size_px: SizePx, share: Share, grey: bool = False) -> tuple[Pixels, dict[int, str]]:
    """Return the cached pixels of photos in one size, and index -> reason for the unreadable photos.

    The pixels of an unreadable photo are 0.
    """
    rows = part.cast_column("image", ImageFeature(decode=False))["image"]
    key = "pixels-" + digest(content_key(part, rows), size_px, *(["grey"] if grey else []))
    folder = cache_folder(key)

    def decode(index: int) -> tuple[np.ndarray | int, str | None]:
        try:
            photo = open_photo(rows[index]["bytes"] or rows[index]["path"])
            return np.asarray(fit_photo(photo.convert("L").convert("RGB") if grey else photo, size_px)), None
        except PhotoError as error:
            return 0, str(error)

    def decode_photos(photos: slice) -> np.ndarray:
        values = np.zeros((photos.stop - photos.start, *size_px, 3), np.uint8)
        with ThreadPoolExecutor() as pool:  # threads run in parallel: Pillow releases the GIL
            decoded = list(pool.map(decode, range(photos.start, photos.stop)))
        for offset, (image, _) in enumerate(decoded):
            values[offset] = image
        reasons_file = folder / f"unreadable-{photos.start}.json"
        if reasons := {photos.start + offset: reason for offset, (_, reason) in enumerate(decoded) if reason}:
            write_json(reasons_file, reasons)
        else:  # an interrupted run may have written it for photos that can be read now
            reasons_file.unlink(missing_ok=True)
        return values

    values = cached_array(key, (len(rows), *size_px, 3), np.uint8, decode_photos, "decoding photos", share)
    reasons = [read_json(file) for file in folder.glob("unreadable-*.json")]
    return Pixels(values, key), {
        int(index): reason for part_reasons in reasons for index, reason in part_reasons.items()
    }
