"""Arrays of photos that do not all have the same image size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from corel_diffusers.data.cache import ShardedArray

Array = ShardedArray | np.ndarray | torch.Tensor


@dataclass
class MixedArray:
    """One array per image size, indexed by photo like one array: `array[3]`, `array[2:9]`, `array[[4, 1], [0, 2]]`.

    Photos of one size are returned as one array, (photos, …). Photos of several sizes are returned as a list with one
    array per photo.
    """

    parts: list[Array]  # one array per image size: the values of its photos
    part_of: np.ndarray  # (N,), the part that holds each photo
    row_of: np.ndarray  # (N,), the place of each photo in its part

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, Array]]) -> "MixedArray":
        """Join arrays of several image sizes.

        Args:
            parts: for each size, the indices of its photos among all photos, and the array of these photos.
        """
        count = sum(len(photos) for photos, _ in parts)
        part_of, row_of = np.zeros(count, int), np.zeros(count, int)
        for number, (photos, _) in enumerate(parts):
            part_of[photos], row_of[photos] = number, np.arange(len(photos))
        return cls([array for _, array in parts], part_of, row_of)

    def __len__(self) -> int:
        return len(self.part_of)

    def __getitem__(self, key: int | slice | Sequence[int] | tuple) -> np.ndarray | list[np.ndarray]:
        photos, *entries = key if isinstance(key, tuple) else (key,)
        if np.ndim(photos) == 0 and not isinstance(photos, slice):
            if not 0 <= photos < len(self):
                raise IndexError(f"photo {photos} is out of range: there are {len(self)}")  # ends a `for` loop
            return self.parts[self.part_of[photos]][self.row_of[photos]]
        rows = np.arange(len(self))[photos]
        if len(np.unique(self.part_of[rows])) == 1:
            part, rows = self.located(rows)
            return part[(rows, *entries)]
        entries = [np.broadcast_to(entry, len(rows)) for entry in entries]
        return [
            self.parts[self.part_of[photo]][(self.row_of[[photo]], *(entry[[index]] for entry in entries))][0]
            for index, photo in enumerate(rows)
        ]

    def located(self, photos: np.ndarray) -> tuple[Array, np.ndarray]:
        """Return the array that holds photos of one size, and their places in it."""
        return self.parts[self.part_of[photos[0]]], self.row_of[photos]

    def select(self, photos: np.ndarray) -> "MixedArray":
        """Return the array of some of the photos. Nothing is copied."""
        return MixedArray(self.parts, self.part_of[photos], self.row_of[photos])

    def map(self, function: Callable[[Array], Array]) -> "MixedArray":
        """Return the array whose parts are the results of the function for the parts of this one."""
        return MixedArray([function(part) for part in self.parts], self.part_of, self.row_of)

    def photos_by_part(self) -> list[np.ndarray]:
        """Return the indices of the photos of each part."""
        return [np.flatnonzero(self.part_of == number) for number in range(len(self.parts))]


def join(parts: Sequence[tuple[np.ndarray, Array]]) -> Array | MixedArray:
    """Return the array of photos of one or several image sizes. The parts are those of `MixedArray.of`."""
    return parts[0][1] if len(parts) == 1 else MixedArray.of(parts)


def parts_of(array: Array | MixedArray) -> list[Array]:
    """Return the arrays of the image sizes."""
    return array.parts if isinstance(array, MixedArray) else [array]


def stacked(images: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Return images as one array if they have the same size. Otherwise return them as a list."""
    images = list(images)
    return np.stack(images) if len({image.shape for image in images}) == 1 else images
