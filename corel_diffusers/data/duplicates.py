"""Which photos show the same: exact and near duplicates, by perceptual hashes of 64 bits (`imagehash.phash`)."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

NEAR_BITS = 8  # of 64: perceptual hashes of re-saved and slightly cropped copies differ in at most 6, those of other photos in 10


def duplicate_groups(hashes: list[str]) -> list[int]:
    """A group number for each photo: exact and near duplicates (NEAR_BITS) share one, along chains too."""
    bits, place = np.unique(np.array([int(value, 16) for value in hashes], dtype=np.uint64), return_inverse=True)
    near = [np.flatnonzero(np.bitwise_count(bits[:index] ^ bits[index]) <= NEAR_BITS) for index in range(len(bits))]
    pairs = np.repeat(np.arange(len(bits)), [len(others) for others in near]), np.concatenate(near)
    graph = coo_array((np.ones(len(pairs[0])), pairs), shape=(len(bits), len(bits)))
    return connected_components(graph, directed=False)[1][place].tolist()
