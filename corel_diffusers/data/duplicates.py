"""Find exact and near duplicates and mirror images of photos by 64-bit perceptual hashes (`imagehash.phash`)."""

from collections.abc import Callable

import imagehash
import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Hashes of 64 bits are near if they differ in at most this many bits. The hashes of re-saved and slightly cropped
# copies differ in at most 6 bits. The hashes of different photos differ in 10 or more.
NEAR_BITS = 8


def photo_hashes(photo: Image.Image) -> tuple[str, str]:
    """Return the perceptual hash of a photo and the hash of its mirror image."""
    return str(imagehash.phash(photo)), str(imagehash.phash(ImageOps.mirror(photo)))


def duplicate_groups(
    hashes: list[tuple[str, str]], confirm: Callable[[int, np.ndarray], np.ndarray] | None = None
) -> list[int]:
    """Return a group number for each photo. Duplicates have the same group number.

    Two photos are duplicates if a hash of one differs from a hash of the other in at most NEAR_BITS bits. This finds
    exact duplicates, near duplicates and mirror images. Photos that a chain of duplicates connects are one group.

    Args:
        hashes: the `photo_hashes` of each photo.
        confirm: an optional second test. It takes the index of a photo and the indices of photos with near hashes, and
            returns a mask of the true duplicates. Photos with little detail (sky, sea) have near hashes even when they
            are different.
    """
    values = np.array([[int(value, 16) for value in pair] for pair in hashes], dtype=np.uint64)  # (N, 2)
    neighbours = []
    for index, pair in enumerate(values):
        differing_bits = np.bitwise_count(values[index + 1 :, :, None] ^ pair)
        near = index + 1 + np.flatnonzero((differing_bits <= NEAR_BITS).any((1, 2)))
        neighbours.append(near[confirm(index, near)] if confirm and len(near) else near)
    first, second = np.repeat(np.arange(len(values)), [len(near) for near in neighbours]), np.concatenate(neighbours)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(values), len(values)))
    return connected_components(graph, directed=False)[1].tolist()
