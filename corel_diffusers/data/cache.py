"""Arrays over photos that are computed once and kept on the disk: pixels, latents, features.

An array is a folder, named by a key that stands for its content: index.json and shards of consecutive photos as safetensors. A
shard is there whole or not at all. So an interrupted run goes on with the shards that are missing, several processes share them
out, and reading a photo takes the time and the memory of a photo, however many there are.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import config
from safetensors.numpy import save_file
from tqdm import tqdm

from corel_diffusers.files import read_json, whole_file, write_json

CACHE_VERSION = "2"  # to be raised when the code that fills a cache fills it with something else
CACHE_DIR = Path(config.HF_CACHE_HOME).expanduser() / "corel_diffusers" / CACHE_VERSION
SHARD_BYTES, FEWEST = 2**26, 64  # of few photos, shards are smaller, so that there are some to share out: FEWEST photos or more


class Share(NamedTuple):
    """Which of the processes that fill a cache this is, of how many, and how it waits for the others. By default it is alone."""

    place: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Share()


class Shards:
    """An array on the disk, (photos, …), read as a numpy array is: `array[3]`, `array[2:9]`, `array[[4, 1]]`.

    `array[[4, 1], [0, 2]]` reads one entry of the second axis for each photo. It reads files, without mapping them: mapped pages
    would count as the process's memory for as long as the system has some to spare.
    """

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / "index.json")
        self.folder, self.shape, self.dtype = folder, tuple(index["shape"]), np.dtype(index["dtype"])
        self.photos_a_shard = index["photos_a_shard"]
        self.headers: dict[int, int] = {}  # shard -> bytes before its values

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: int | slice | Sequence[int] | tuple) -> np.ndarray:
        photos, *entries = key if isinstance(key, tuple) else (key,)
        if isinstance(photos, slice):
            start, stop, step = photos.indices(len(self))
            if step != 1:
                raise IndexError(f"{photos}: every photo from one to another, or name them")
            cuts = [start, *range((start // self.photos_a_shard + 1) * self.photos_a_shard, stop, self.photos_a_shard), stop]
            parts = [self.read(first, last - first) for first, last in pairwise(cuts) if first < last]
            return np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *parts])[(slice(None), *entries)]
        if np.ndim(photos) == 0:
            if not 0 <= photos < len(self):
                raise IndexError(f"photo {photos} of {len(self)}")  # which ends a loop over the array
            return self.read(int(photos), 1)[0]
        photos = np.asarray(photos)
        if photos.dtype == bool or (len(photos) and not 0 <= photos.min() <= photos.max() < len(self)):
            raise IndexError(f"{photos}: the numbers of photos, from 0 to {len(self) - 1}")
        (entries,) = entries or [None]
        entries = [None] * len(photos) if entries is None else np.broadcast_to(entries, len(photos))
        return np.concatenate([self.read(int(photo), 1, entry) for photo, entry in zip(photos, entries, strict=True)])

    def read(self, photo: int, count: int, entry: int | None = None) -> np.ndarray:
        """`count` photos of one shard, from `photo` on; with `entry`, that one of a photo's entries: (count, …)."""
        shard, place = divmod(photo, self.photos_a_shard)
        shape = self.shape[1:]
        if entry is not None:
            place, shape = place * shape[0] + int(entry), shape[1:]
        path, size = shard_path(self.folder, shard), math.prod(shape)
        if shard not in self.headers:  # the format: 8 bytes of length, so much JSON, the values
            self.headers[shard] = 8 + int.from_bytes(path.open("rb").read(8), "little")
        begin = self.headers[shard] + place * size * self.dtype.itemsize
        return np.fromfile(path, self.dtype, count * size, offset=begin).reshape(count, *shape)


def cache_folder(key: str) -> Path:
    """Where the array of that key lies."""
    return CACHE_DIR / key


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def cached_array(
    key: str,
    shape: tuple[int, ...],
    dtype: type,
    make: Callable[[slice], np.ndarray],
    doing: str,
    share: Share = ALONE,
    at_once: int = 256,
) -> Shards:
    """The array of that key. What is missing of it is made, `at_once` photos at a time, and shows its progress.

    make: a range of photos -> their values. doing: what the progress bar says. share: every process of it has to call.
    """
    folder, dtype = cache_folder(key), np.dtype(dtype)
    if not (folder / "index.json").is_file():
        photos_a_shard = min(SHARD_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize), max(FEWEST, math.ceil(shape[0] / 64)))
        write_json(folder / "index.json", {"shape": shape, "dtype": dtype.name, "photos_a_shard": max(1, photos_a_shard)})
    array = Shards(folder)
    photos_a_shard = array.photos_a_shard

    def fill(shards: range, hidden: bool) -> None:
        missing = [shard for shard in shards if not shard_path(folder, shard).is_file()]
        for shard in tqdm(missing, doing, unit=" shards", leave=False, disable=hidden or not missing or None):
            first, last = shard * photos_a_shard, min((shard + 1) * photos_a_shard, shape[0])
            parts = [make(slice(start, min(start + at_once, last))) for start in range(first, last, at_once)]
            with whole_file(shard_path(folder, shard)) as beside:
                save_file({"values": np.concatenate(parts).astype(dtype, copy=False)}, beside)

    shards = math.ceil(shape[0] / photos_a_shard)
    fill(range(share.place, shards, share.count), hidden=share.place > 0)
    share.wait()
    fill(range(shards), hidden=False)  # nothing is left, unless the processes of this machine were not those that were counted
    return array


def digest(*parts: object) -> str:
    """A short name for content: 24 hex digits of SHA-256 over the parts' representation."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
