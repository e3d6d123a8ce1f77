"""Decode photos to RGB pixels, resize and crop them once into a uint8 cache, and read them as float batches."""

import hashlib
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature

from corel_diffusers.data.cache import SINGLE_PROCESS, ShardedArray, Share, cache_folder, cached_array, digest
from corel_diffusers.data.decoding import PhotoError, fit_photo, open_photo, unreadable_file
from corel_diffusers.files import UserError, read_json, write_json
from corel_diffusers.internals import fingerprint

SAMPLE_BYTES = 2**14  # bytes hashed in each of three places of a file: see `file_sample`
CROP_SCALE = 2.5  # random crops are cut from photos of at most this many times the training size


@dataclass
class Pixels:
    """The decoded photos of one split: uint8 (N, H, W, 3) on disk or in memory, and a key for their content."""

    values: ShardedArray | np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: np.ndarray | slice) -> torch.Tensor:
        """Return photos as float32 (B, 3, H, W) in [-1, 1], in channels-last memory format."""
        return to_float(torch.from_numpy(self.values[indices]))

    def evenly_spaced(self, at_most: int) -> "Pixels":
        """Return at most `at_most` of the photos, evenly spaced."""
        if len(self) <= at_most:
            return self
        return Pixels(self.values[evenly_spaced(len(self), at_most)], f"{self.key}-evenly")


def evenly_spaced(count: int, at_most: int) -> np.ndarray:
    """Return at most `at_most` evenly spaced indices below `count`.

    Photos of a folder are usually sorted by class, so evenly spaced photos come from many classes.
    """
    return np.linspace(0, count - 1, min(count, at_most)).astype(int)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def cache_pixels(
    photos: DatasetDict, size_px: tuple[int, int], share: Share = SINGLE_PROCESS
) -> tuple[DatasetDict, dict[str, Pixels]]:
    """Decode, resize and crop each photo once, and cache the pixels.

    The key of the cache depends on `content_key` and on the size in pixels. If one of them changes, the photos are
    decoded again.

    Returns:
        The photos without the unreadable ones, and the Pixels of each split. One printed line names the unreadable
        photos.
    """
    kept, pixels, bad = {}, {}, []
    for split, part in photos.items():
        all_pixels, reasons = decode_split(part, size_px, share)
        good = [index for index in range(len(part)) if index not in reasons]
        bad += [f"{part['file_name'][index]}: {reason}" for index, reason in reasons.items()]
        if not good:
            raise UserError(f"no photo of the {split} split can be read: {'; '.join(bad[:3])}")
        kept[split] = part.select(good)
        pixels[split] = without_unreadable(all_pixels, good) if reasons else all_pixels
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


def cache_large_pixels(photos: DatasetDict, size_px: tuple[int, int], share: Share = SINGLE_PROCESS) -> Pixels:
    """Return the training photos with more pixels than `size_px`, for random crops.

    The size is `size_px` times CROP_SCALE, or less if a typical photo has fewer pixels, but never less than `size_px`.
    """
    factor = min(CROP_SCALE, max(1.0, native_side_px(photos) / min(size_px)))
    kept, pixels = cache_pixels(
        DatasetDict(train=photos["train"]), tuple(round(factor * side) for side in size_px), share
    )
    if len(kept["train"]) < len(photos["train"]):
        raise UserError(
            "--data-dir: some photos that could be read before cannot be read now: "
            "check that the disk is connected, then start again"
        )
    return pixels["train"]


def native_side_px(photos: DatasetDict, max_opened: int = 16) -> float:
    """Return the shorter side of a typical training photo in pixels: the median of a few evenly spaced photos."""
    part = (
        photos["train"]
        .select(evenly_spaced(len(photos["train"]), max_opened))
        .cast_column("image", ImageFeature(decode=False))
    )
    sides = []
    for row in part["image"]:
        try:
            sides.append(min(open_photo(row["bytes"] or row["path"]).size))
        except PhotoError:  # `cache_pixels` reports it
            continue
    return statistics.median(sides) if sides else 0


def decode_split(part: Dataset, size_px: tuple[int, int], share: Share) -> tuple[Pixels, dict[int, str]]:
    """Return the cached pixels of all photos of a split, and index -> reason for the unreadable photos.

    The pixels of an unreadable photo are 0.
    """
    rows = part.cast_column("image", ImageFeature(decode=False))["image"]
    key = "pixels-" + digest(content_key(part, rows), size_px)
    folder = cache_folder(key)

    def decode(index: int) -> tuple[np.ndarray | int, str | None]:
        try:
            return np.asarray(fit_photo(open_photo(rows[index]["bytes"] or rows[index]["path"]), size_px)), None
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


def content_key(part: Dataset, rows: Sequence[dict]) -> object:
    """Return a value that changes when a photo of the split changes.

    For a dataset that is memory-mapped and contains its photos as bytes, this is the fingerprint that `datasets`
    computes. The photos are not read for it: reading a million photos would take longer than the step that waits for
    the key.
    """
    return fingerprint(part) if part.cache_files and rows[0]["bytes"] is not None else [file_key(row) for row in rows]


def file_key(row: dict) -> tuple:
    """Return a value that changes when a photo changes.

    It is a hash of the bytes, or the path, size, modification time and `file_sample` of the file.
    """
    if row["bytes"] is not None:
        return (hashlib.sha256(row["bytes"]).hexdigest(),)
    path = Path(row["path"])
    try:
        stat = path.stat()
        return (str(path.resolve()), stat.st_size, stat.st_mtime_ns, file_sample(path, stat.st_size))
    except OSError as error:
        raise unreadable_file(path, error) from None


def file_sample(path: Path, size: int) -> str:
    """Return a hash of a file of `size` bytes. For a large file, only its first, middle and last SAMPLE_BYTES are read.

    The size and the modification time do not detect every change: archive and sync tools can write a new file with the
    same size and restore the old time. Reading ten thousand large files completely would take minutes.
    """
    with path.open("rb") as file:
        if size <= 4 * SAMPLE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()
        parts = []
        for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            file.seek(start)
            parts.append(file.read(SAMPLE_BYTES))
        return hashlib.sha256(b"".join(parts)).hexdigest()
