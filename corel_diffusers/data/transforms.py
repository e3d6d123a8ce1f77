"""Decode photos to RGB pixels, resize and crop them once into a uint8 cache, and read them as float batches.

Photos can be rotated by EXIF, have an alpha channel, be CMYK or 16-bit, or be truncated. `open_photo` converts every
file that can be shown. For other files it raises PhotoError with a reason. `prepare` and the training scripts both use
it.
"""

import hashlib
import io
import statistics
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

from corel_diffusers.data.cache import SINGLE_PROCESS, ShardedArray, Share, cache_folder, cached_array, digest
from corel_diffusers.files import UserError, read_json, write_json

# Pillow warns from about 90 megapixels, but 100-megapixel cameras exist. It still raises an error at twice its limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MIN_SIDE_PX = 32
SAMPLE_BYTES = 2**14  # bytes hashed in each of three places of a file: see `file_sample`
CROP_SCALE = 2.5  # random crops are cut from photos of at most this many times the training size


class PhotoError(Exception):
    """A file cannot be used as a photo. The message is the reason in a few words."""


def open_photo(file: Path | str | bytes) -> Image.Image:
    """Open a photo (path or bytes) as 8-bit RGB, with its EXIF rotation applied and its alpha channel on white.

    Raises:
        PhotoError: the file cannot be used as a photo.
        UserError: the system cannot read the file (disk, permissions). The photo itself may be good, so later runs must
            not treat it as damaged.
    """
    try:
        photo = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        frames = getattr(photo, "n_frames", 1)
        if frames > 1 and photo.format != "MPO":  # an MPO is a JPEG of a phone, followed by a preview
            raise PhotoError(f"animated or multi-page ({frames} frames)")
        photo.load()
        if orientation(photo) != 1:
            photo = ImageOps.exif_transpose(photo)
    except UnidentifiedImageError:
        raise PhotoError("not an image") from None
    except Image.DecompressionBombError:
        raise PhotoError("too many pixels to open safely") from None
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error) as error:
        if getattr(error, "errno", None):
            raise unreadable_file(file, error) from None
        raise PhotoError("truncated" if "truncated" in str(error) else f"damaged ({error})") from None
    if min(photo.size) < MIN_SIDE_PX:
        raise PhotoError(f"tiny ({photo.width}x{photo.height} px)")
    if photo.mode.startswith("I") or photo.mode == "F":
        photo = to_eight_bits(photo)
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def unreadable_file(file: Path | str | bytes, error: OSError) -> UserError:
    """Return the error for a file that exists but that the disk or its permissions do not let us read."""
    return UserError(
        f"{file} cannot be read ({error.strerror}): check the disk and the file permissions, then start again"
    )


def orientation(photo: Image.Image) -> int:
    """Return the EXIF orientation: 1 (upright) if it is missing or cannot be read."""
    try:
        return photo.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, struct.error):
        return 1


def to_eight_bits(photo: Image.Image) -> Image.Image:
    """Convert a 16-bit, 32-bit or float greyscale image to 8 bits. 16-bit values are divided by 257: 65535 becomes 255.

    A float image has the range 0 to 1 if its maximum is at most 1, and 0 to 255 otherwise. A 32-bit image has 8-bit
    values if its maximum is at most 255, and 16-bit values otherwise.
    """
    values = np.asarray(photo).astype(np.float64)
    narrow_max = {"F": 1, "I": 255}.get(photo.mode, -1)
    scale = {"F": 255, "I": 1}[photo.mode] if values.max() <= narrow_max else 1 if photo.mode == "F" else 1 / 257
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def fit_photo(photo: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resize and centre-crop a photo to (height, width), with Lanczos, the best antialiasing filter for reduction."""
    return ImageOps.fit(photo, (size_px[1], size_px[0]), Image.Resampling.LANCZOS)


@dataclass
class Pixels:
    """The decoded photos of one split: uint8 (N, H, W, 3) on disk, and a key that identifies their content."""

    values: ShardedArray | np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: np.ndarray | slice) -> torch.Tensor:
        """Return photos as float32 (B, 3, H, W) in [-1, 1], in channels-last memory format."""
        return to_float(torch.from_numpy(self.values[indices]))

    def evenly_spaced(self, at_most: int) -> "Pixels":
        """Return at most `at_most` of the photos, evenly spaced."""
        return (
            self
            if len(self) <= at_most
            else Pixels(self.values[evenly_spaced(len(self), at_most)], f"{self.key}-evenly")
        )


def evenly_spaced(count: int, at_most: int) -> np.ndarray:
    """Return at most `at_most` evenly spaced indices below `count`.

    Photos are sorted by class, so evenly spaced photos come from all classes.
    """
    return np.linspace(0, count - 1, min(count, at_most)).astype(int)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def random_crops(
    large: torch.Tensor, fitted: torch.Tensor, is_crop: torch.Tensor, crop_params: torch.Tensor, jitter: torch.Tensor
) -> torch.Tensor:
    """Return augmented photos, float32 (B, 3, H, W) in [-1, 1]: full photos or random crops, with colour jitter.

    Keep `is_crop` and `crop_params` on the CPU. They are read one element at a time, and each read from a GPU would
    make the CPU wait for the GPU.

    Args:
        large: uint8 (B, H2, W2, 3), the photos with more pixels. Crops are cut from them.
        fitted: uint8 (B, H, W, 3), the same photos at the training size.
        is_crop: bool (B,). True replaces the photo with a crop.
        crop_params: (B, 3) in [0, 1): the scale, top and left of each crop. Scale 0 is the smallest crop, H x W pixels
            of `large`. Scale 1 is the full photo. The scale between them is logarithmic. Top and left are fractions of
            the space outside the crop.
        jitter: (B, 2), the colour jitter: it is added to the contrast, which is 1, and to the brightness.
    """
    photos = to_float(fitted)
    height, width = photos.shape[-2:]
    for row in is_crop.nonzero().flatten().tolist():
        scale, top_fraction, left_fraction = crop_params[row].tolist()
        sides = [
            round(small * (big / small) ** scale) for small, big in ((height, large.shape[1]), (width, large.shape[2]))
        ]
        top, left = (
            int(fraction * (full - side + 1))
            for fraction, full, side in zip((top_fraction, left_fraction), large.shape[1:3], sides, strict=True)
        )
        crop = to_float(large[row : row + 1, top : top + sides[0], left : left + sides[1]])
        photos[row] = F.interpolate(crop, (height, width), mode="bicubic", antialias=True)[0]
    contrast, brightness = jitter.view(-1, 2, 1, 1, 1).unbind(1)
    return (photos * (1 + contrast) + brightness).clamp(-1, 1)


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
        print(f"{len(bad)} photos cannot be read and are left out: {'; '.join(bad[:5])}{' …' if len(bad) > 5 else ''}")
    return DatasetDict(kept), pixels


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
    """Return the shorter side of a typical training photo in pixels: the median of a few photos of all classes."""
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
    return part._fingerprint if part.cache_files and rows[0]["bytes"] is not None else [file_key(row) for row in rows]


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
