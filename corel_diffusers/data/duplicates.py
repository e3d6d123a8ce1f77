"""Which photos show the same: exact and near duplicates and mirror images, by perceptual hashes of 64 bits (`imagehash.phash`)."""

import imagehash
import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

NEAR_BITS = 8  # of 64: perceptual hashes of re-saved and slightly cropped copies differ in at most 6, those of other photos in 10


def photo_hashes(photo: Image.Image) -> tuple[str, str]:
    """The hash of a photo and that of its mirror image."""
    return str(imagehash.phash(photo)), str(imagehash.phash(ImageOps.mirror(photo)))


def duplicate_groups(hashes: list[tuple[str, str]]) -> list[int]:
    """The hashes of each photo -> a group number for each: exact and near duplicates (NEAR_BITS) and mirror images share one, along
    chains too."""
    values = np.array([[int(value, 16) for value in both] for both in hashes], dtype=np.uint64)  # (N, 2)
    bits, place = np.unique(values, return_inverse=True)
    near = [np.flatnonzero(np.bitwise_count(bits[:index] ^ bits[index]) <= NEAR_BITS) for index in range(len(bits))]
    pairs = np.repeat(np.arange(len(bits)), [len(others) for others in near]), np.concatenate(near)
    place = place.reshape(values.shape)
    pairs = np.concatenate([pairs, place.T], 1)  # the two hashes of one photo belong together
    graph = coo_array((np.ones(len(pairs[0])), pairs), shape=(len(bits), len(bits)))
    return connected_components(graph, directed=False)[1][place[:, 0]].tolist()
