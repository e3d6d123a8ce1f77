"""Photos -> pixels: RGB, resized and cropped once into a uint8 cache, read as float batches.

Photos come in every state: rotated by EXIF, with alpha, CMYK, 16-bit, truncated. `open_photo` converts what can be shown
and refuses the rest with a reason, once, for preparing and for training alike.
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

from corel_diffusers.data.cache import ALONE, Shards, Share, cache_folder, cached_array, digest
from corel_diffusers.files import UserError, read_json, write_json

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # 100-megapixel cameras exist; twice as much is refused
MIN_SIDE_PX = 32
SAMPLE_BYTES = 2**14  # of a photo's file, in each of three places: what tells it from another of the same size and time
CROP_SCALE = 2.5  # crops are cut from photos kept at up to so many times the training size


class PhotoError(Exception):
    """Why a file cannot serve as a photo, in a few words."""


def open_photo(file: Path | str | bytes) -> Image.Image:
    """A file's path or bytes -> 8-bit RGB, upright, alpha laid on white. Raises PhotoError, and UserError where it is not the photo's
    fault: what the disk or its rights refuse today must not count as damaged tomorrow."""
    try:
        photo = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        frames = getattr(photo, "n_frames", 1)
        if frames > 1 and photo.format != "MPO":  # an MPO is a phone's JPEG with a preview behind it
            raise PhotoError(f"animated or multi-page ({frames} frames)")
        photo.load()
        if orientation(photo) != 1:
            photo = ImageOps.exif_transpose(photo)
    except UnidentifiedImageError:
        raise PhotoError("not a picture") from None
    except Image.DecompressionBombError:
        raise PhotoError("too many pixels to open safely") from None
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error) as error:
        if getattr(error, "errno", None):
            raise refused(file, error) from None
        raise PhotoError("truncated" if "truncated" in str(error) else f"damaged ({error})") from None
    if min(photo.size) < MIN_SIDE_PX:
        raise PhotoError(f"tiny ({photo.width}x{photo.height} px)")
    if photo.mode.startswith("I") or photo.mode == "F":
        photo = eight_bits(photo)
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def refused(file: Path | str | bytes, error: OSError) -> UserError:
    """What a file comes to that is there and that the disk or its rights do not give."""
    return UserError(f"{file} cannot be read ({error.strerror}): see to its disk and its rights, and start again")


def orientation(photo: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or where it cannot be read."""
    try:
        return photo.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, struct.error):
        return 1


def eight_bits(photo: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits -> 8 bits. 16-bit values are divided by 257, so that 65535 becomes 255."""
    values = np.asarray(photo).astype(np.float64)
    small = {"F": 1, "I": 255}.get(photo.mode, -1)  # up to here, values are read as 0 to 1, as 0 to 255
    scale = {"F": 255, "I": 1}[photo.mode] if values.max() <= small else 1 if photo.mode == "F" else 1 / 257
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def fit_photo(photo: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Resizes and crops the middle to (height, width), with the antialiasing filter that shrinks best (Lanczos)."""
    return ImageOps.fit(photo, (size_px[1], size_px[0]), Image.Resampling.LANCZOS)


@dataclass
class Pixels:
    """The decoded photos of one split: uint8 (N, H, W, 3) on disk, and the key that stands for their content."""

    values: Shards | np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: np.ndarray | slice) -> torch.Tensor:
        """float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
        return to_float(torch.from_numpy(self.values[indices]))

    def evenly(self, at_most: int) -> "Pixels":
        """Some of the photos, evenly over all."""
        return self if len(self) <= at_most else Pixels(self.values[evenly(len(self), at_most)], f"{self.key}-evenly")


def evenly(count: int, at_most: int) -> np.ndarray:
    """The places of at most so many of `count` things, evenly over all: photos lie in folders by class."""
    return np.linspace(0, count - 1, min(count, at_most)).astype(int)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def random_views(
    large: torch.Tensor, fitted: torch.Tensor, cropped: torch.Tensor, places: torch.Tensor, jitter: torch.Tensor
) -> torch.Tensor:
    """Photos as training sees them, float32 (B, 3, H, W) in [-1, 1]: as they are, or a random crop; brightness and contrast varied.

    large: uint8 (B, H2, W2, 3), the same photos at more pixels; fitted: uint8 (B, H, W, 3). cropped (B,) bool: which come as a crop.
    places (B, 3) in [0, 1): how far the crop's side lies from the smallest, of H by W pixels of `large`, to the whole photo, on
    a logarithmic scale, and where it begins, down and across. jitter (B, 2): added to the contrast 1, and to the brightness. `cropped`
    and `places` are looked at one by one: on the CPU, or a GPU waits for each.
    """
    photos = to_float(fitted)
    height, width = photos.shape[-2:]
    for row in cropped.nonzero().flatten().tolist():
        scale, down, across = places[row].tolist()
        sides = [round(small * (big / small) ** scale) for small, big in ((height, large.shape[1]), (width, large.shape[2]))]
        top, left = (int(share * (whole - side + 1)) for share, whole, side in zip((down, across), large.shape[1:3], sides, strict=True))
        crop = to_float(large[row : row + 1, top : top + sides[0], left : left + sides[1]])
        photos[row] = F.interpolate(crop, (height, width), mode="bicubic", antialias=True)[0]
    contrast, brightness = jitter.view(-1, 2, 1, 1, 1).unbind(1)
    return (photos * (1 + contrast) + brightness).clamp(-1, 1)


def cache_pixels(photos: DatasetDict, size_px: tuple[int, int], share: Share = ALONE) -> tuple[DatasetDict, dict[str, Pixels]]:
    """Decodes, resizes and crops each photo once.

    Returns the photos without those that cannot be read (they are named in one line) and, for each split, their Pixels. The
    key holds what `content_key` takes, and the size in pixels: what changes any of it is decoded anew.
    """
    kept, pixels, bad = {}, {}, []
    for split, part in photos.items():
        all_pixels, reasons = decode_split(part, size_px, share)
        good = [index for index in range(len(part)) if index not in reasons]
        bad += [f"{part['file_name'][index]}: {reason}" for index, reason in reasons.items()]
        if not good:
            raise UserError(f"no photo of the {split} split can be read: {'; '.join(bad[:3])}")
        kept[split] = part.select(good)
        pixels[split] = readable(all_pixels, good) if reasons else all_pixels
    if bad:
        print(f"{len(bad)} photos cannot be read and are left out: {'; '.join(bad[:5])}{' …' if len(bad) > 5 else ''}")
    return DatasetDict(kept), pixels


def readable(pixels: Pixels, good: list[int]) -> Pixels:
    """The photos of a split that could be read, on disk as well."""
    key, shape = f"{pixels.key}-{digest(good)}", (len(good), *pixels.values.shape[1:])
    return Pixels(cached_array(key, shape, np.uint8, lambda photos: pixels.values[good[photos]], "leaving out photos"), key)


def cache_large_pixels(photos: DatasetDict, size_px: tuple[int, int], share: Share = ALONE) -> Pixels:
    """The training photos at more pixels than `size_px`, as far as they have them, for crops of them."""
    factor = min(CROP_SCALE, max(1.0, native_side_px(photos) / min(size_px)))
    kept, pixels = cache_pixels(DatasetDict(train=photos["train"]), tuple(round(factor * side) for side in size_px), share)
    if len(kept["train"]) < len(photos["train"]):
        raise UserError("--data-dir: some photos could be read a moment ago and cannot be now: see that the disk is there, and start again")
    return pixels["train"]


def native_side_px(photos: DatasetDict, looked_at: int = 16) -> float:
    """The shorter side of a typical training photo, in pixels: the median of a few, evenly over all classes."""
    part = photos["train"].select(evenly(len(photos["train"]), looked_at)).cast_column("image", ImageFeature(decode=False))
    sides = []
    for row in part["image"]:
        try:
            sides.append(min(open_photo(row["bytes"] or row["path"]).size))
        except PhotoError:  # named when the photos are decoded
            continue
    return statistics.median(sides) if sides else 0


def decode_split(part: Dataset, size_px: tuple[int, int], share: Share) -> tuple[Pixels, dict[int, str]]:
    """The cached pixels of every photo of a split, and index -> reason for those that cannot be read (their pixels are 0)."""
    rows = part.cast_column("image", ImageFeature(decode=False))["image"]
    key = "pixels-" + digest(content_key(part, rows), size_px)
    folder = cache_folder(key)

    def decode(index: int) -> tuple[np.ndarray | int, str | None]:
        try:
            return np.asarray(fit_photo(open_photo(rows[index]["bytes"] or rows[index]["path"]), size_px)), None
        except PhotoError as error:
            return 0, str(error)

    def make(photos: slice) -> np.ndarray:
        values = np.zeros((photos.stop - photos.start, *size_px, 3), np.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
            found = list(pool.map(decode, range(photos.start, photos.stop)))
        for place, (picture, _) in enumerate(found):
            values[place] = picture
        beside = folder / f"unreadable-{photos.start}.json"
        if reasons := {photos.start + place: reason for place, (_, reason) in enumerate(found) if reason}:
            write_json(beside, reasons)
        else:  # an interrupted run may have met what has passed by
            beside.unlink(missing_ok=True)
        return values

    values = cached_array(key, (len(rows), *size_px, 3), np.uint8, make, "decoding photos", share)
    reasons = [read_json(file) for file in folder.glob("unreadable-*.json")]
    return Pixels(values, key), {int(index): reason for some in reasons for index, reason in some.items()}


def content_key(part: Dataset, rows: Sequence[dict]) -> object:
    """What changes when a photo of a split changes. A dataset that is mapped from the disk names its content itself, photos within it
    included: they need not be read for that, which for a million takes longer than the step that waits for it."""
    return part._fingerprint if part.cache_files and rows[0]["bytes"] is not None else [file_key(row) for row in rows]


def file_key(row: dict) -> tuple:
    """What changes when a photo changes: its bytes, or its file's path, size, time of change and `content_sample`."""
    if row["bytes"] is not None:
        return (hashlib.sha256(row["bytes"]).hexdigest(),)
    path = Path(row["path"])
    try:
        stat = path.stat()
        return (str(path.resolve()), stat.st_size, stat.st_mtime_ns, content_sample(path, stat.st_size))
    except OSError as error:
        raise refused(path, error) from None


def content_sample(path: Path, size: int) -> str:
    """A hash of a file of `size` bytes: of all of it where it is small, else of its first, middle and last SAMPLE_BYTES.

    A file may be written anew at the same size and get its old time back, as archives and sync tools do; reading all of ten thousand
    large files would take minutes.
    """
    with path.open("rb") as file:
        if size <= 4 * SAMPLE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()
        parts = []
        for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            file.seek(start)
            parts.append(file.read(SAMPLE_BYTES))
        return hashlib.sha256(b"".join(parts)).hexdigest()
