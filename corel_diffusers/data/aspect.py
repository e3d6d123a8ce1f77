"""Aspect buckets: a few image sizes of about the same area, so that photos of every shape keep their full frame."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.cache import SINGLE_PROCESS, Share, cached_array, digest
from corel_diffusers.data.content_keys import content_key
from corel_diffusers.data.decoding import PhotoError, upright_shape
from corel_diffusers.models.configs import check_size

SizePx = tuple[int, int]  # (height, width) in pixels
MAX_SIZES = 5
AREA_TOLERANCE = 0.1  # the area of a size differs from that of --image-size by at most this fraction
MAX_ASPECT = 3.0  # the longer side of a size is at most this many times the shorter one
# A size is added if the photos then keep at least this much more of their area, on average. With fewer photos, a size
# would be trained in few steps and would gain little.
MIN_GAIN = 0.01


def photo_shapes(photos: Dataset, share: Share = SINGLE_PROCESS) -> np.ndarray:
    """Return the height and the width of each photo in pixels, as a viewer shows it: int32 (N, 2), cached.

    Only the headers of the files are read. An unreadable photo has 1 x 1 pixels: decoding it tells the reason.
    """
    rows = photos.cast_column("image", ImageFeature(decode=False))["image"]

    def shape(index: int) -> SizePx:
        try:
            return upright_shape(rows[index]["bytes"] or rows[index]["path"])
        except PhotoError:
            return 1, 1

    def read(chosen: slice) -> np.ndarray:
        with ThreadPoolExecutor() as pool:
            return np.array(list(pool.map(shape, range(chosen.start, chosen.stop))), np.int32)

    key = "shapes-" + digest(content_key(photos, rows))
    return cached_array(key, (len(rows), 2), np.int32, read, "reading the sizes of photos", share)[:]


def kept_area(shapes: np.ndarray, sizes_px: Sequence[SizePx]) -> np.ndarray:
    """Return the fraction of each photo's area that remains when it is cropped to the aspect of each size: (N, S)."""
    aspects = shapes[:, 0] / shapes[:, 1]
    ratios = aspects[:, None] / np.array([height / width for height, width in sizes_px])
    return np.minimum(ratios, 1 / ratios)


def nearest_size(shapes: np.ndarray, sizes_px: Sequence[SizePx]) -> np.ndarray:
    """Return the index of the size in which each photo keeps the most of its area: (N,)."""
    return kept_area(shapes, sizes_px).argmax(1)


def choose_sizes(shapes: np.ndarray, size_px: SizePx, multiple: int) -> list[SizePx]:
    """Return the sizes for photos of these shapes, at most MAX_SIZES. Each of them is used by some photo.

    One size after the other is added: the one with which the photos keep the most of their area. The candidates are
    `size_px`, the same size turned by 90 degrees, and all sizes of about the same area. The sizes with the most photos
    come first; sizes with equally many are sorted by name, so that a saved pipeline has the same order.

    Args:
        shapes: (N, 2), the height and the width of each photo.
        size_px: the size of --image-size.
        multiple: both sides of a size are multiples of this number of pixels.

    Raises:
        UserError: there is no such size.
    """
    area = size_px[0] * size_px[1]
    sides = range(multiple, int(MAX_ASPECT * area**0.5) + 1, multiple)
    candidates = [size_px, size_px[::-1]] + [
        (height, width)
        for height in sides
        for width in sides
        if abs(height * width / area - 1) <= AREA_TOLERANCE and max(height, width) <= MAX_ASPECT * min(height, width)
    ]
    candidates = list(dict.fromkeys(size for size in candidates if not (size[0] % multiple or size[1] % multiple)))
    if not candidates:
        check_size(size_px, multiple, "with --aspect-buckets, the model")
    if not len(shapes):
        return candidates[:1]
    kept, chosen = kept_area(shapes, candidates), []
    while len(chosen) < MAX_SIZES:
        best_so_far = kept[:, chosen].max(1) if chosen else np.zeros(len(shapes))
        means = np.maximum(kept, best_so_far[:, None]).mean(0)  # of each candidate, if it is added
        best = int(means.argmax())  # the first one of equal candidates: that of --image-size
        if means[best] < best_so_far.mean() + MIN_GAIN:
            break
        chosen.append(best)
    sizes = [candidates[index] for index in chosen]
    counts = np.bincount(nearest_size(shapes, sizes), minlength=len(sizes))
    used = [index for index in range(len(sizes)) if counts[index]]
    return [sizes[index] for index in sorted(used, key=lambda index: (-counts[index], "{}x{}".format(*sizes[index])))]


def training_sizes(
    args: TrainingArguments, photos: Dataset, size_px: SizePx, multiple: int, share: Share = SINGLE_PROCESS
) -> list[SizePx]:
    """Return the image sizes of a run, the one with the most training photos first: see `choose_sizes`.

    Without --aspect-buckets it is `size_px` alone.
    """
    if not args.aspect_buckets:
        return [size_px]
    shapes = photo_shapes(photos, share)
    return choose_sizes(shapes[shapes.min(1) > 1], size_px, multiple)


def rows_by_size(
    photos: Dataset, sizes_px: Sequence[SizePx], share: Share = SINGLE_PROCESS
) -> list[tuple[SizePx, np.ndarray]]:
    """Return the sizes that photos of a split have, and the indices of these photos."""
    if len(sizes_px) == 1:
        return [(sizes_px[0], np.arange(len(photos)))]
    chosen = nearest_size(photo_shapes(photos, share), sizes_px)
    return [(size_px, rows) for number, size_px in enumerate(sizes_px) if len(rows := np.flatnonzero(chosen == number))]
