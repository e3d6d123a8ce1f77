"""Which photos show the same: exact and near duplicates and mirror images, by perceptual hashes of 64 bits (`imagehash.phash`)."""

from collections.abc import Callable

import imagehash
import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

NEAR_BITS = 8  # of 64: perceptual hashes of re-saved and slightly cropped copies differ in at most 6, those of other photos in 10


def photo_hashes(photo: Image.Image) -> tuple[str, str]:
    """The hash of a photo and that of its mirror image."""
    return str(imagehash.phash(photo)), str(imagehash.phash(ImageOps.mirror(photo)))


def duplicate_groups(hashes: list[tuple[str, str]], alike: Callable[[int, np.ndarray], np.ndarray] | None = None) -> list[int]:
    """The hashes of each photo -> a group number for each: exact and near duplicates (NEAR_BITS) and mirror images share one, along
    chains too.

    alike: a photo's place and those of others, whose hashes are near -> which of them are duplicates indeed. The hashes of plain pictures,
    as of skies and seas, are near though the pictures are others.
    """
    values = np.array([[int(value, 16) for value in both] for both in hashes], dtype=np.uint64)  # (N, 2)
    pairs = []
    for place, both in enumerate(values):
        differing = np.bitwise_count(values[place + 1 :, :, None] ^ both)
        near = place + 1 + np.flatnonzero((differing <= NEAR_BITS).any((1, 2)))
        pairs.append(near[alike(place, near)] if alike and len(near) else near)
    first, second = np.repeat(np.arange(len(values)), [len(near) for near in pairs]), np.concatenate(pairs)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(values), len(values)))
    return connected_components(graph, directed=False)[1].tolist()
