"""Per-photo arrays (pixels, latents, features) that are computed once and cached on disk.

An array is one folder of shards. The name of the folder is a key that identifies the content. A shard
is a safetensors file with the values of consecutive photos. Each shard is written atomically, so an interrupted run
continues with the missing shards, and several processes can divide the shards among them. Reading one photo takes the
time and the memory of one photo, whatever the size of the array.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from datasets import config
from safetensors.numpy import save_file
from tqdm import tqdm

from corel_diffusers.files import atomic_file, explain_full_disk, require_space

CACHE_VERSION = "3"  # increase it when the code that fills a cache computes different values
CACHE_DIR = Path(config.HF_CACHE_HOME).expanduser() / "corel_diffusers" / CACHE_VERSION
# A small array gets smaller shards, of at least MIN_PHOTOS photos, so that several processes have shards to divide.
# With other numbers, increase CACHE_VERSION.
SHARD_BYTES, MIN_PHOTOS = 2**26, 64


class Share(NamedTuple):
    """The place of this process among the processes that fill a cache together. The default is a single process."""

    process_index: int = 0
    num_processes: int = 1
    wait_for_everyone: Callable[[], None] = lambda: None


SINGLE_PROCESS = Share()


class ShardedArray:
    """An array on disk, (photos, …), that is indexed like a numpy array: `array[3]`, `array[2:9]`, `array[[4, 1]]`.

    `array[[4, 1], [0, 2]]` reads one entry of the second axis for each photo. Files are read and not memory-mapped: the
    system counts mapped pages as memory of the process for as long as it has memory to spare.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, tuple(shape), dtype
        photo_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
        self.photos_per_shard = max(1, min(SHARD_BYTES // photo_bytes, max(MIN_PHOTOS, math.ceil(shape[0] / 64))))
        self.header_bytes: dict[int, int] = {}  # shard -> size of its header, after which its values begin

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: int | slice | Sequence[int] | tuple) -> np.ndarray:
        photos, *entries = key if isinstance(key, tuple) else (key,)
        if isinstance(photos, slice):
            start, stop, step = photos.indices(len(self))
            if step != 1:
                raise IndexError(f"{photos}: only slices with step 1 are supported: give the indices of the photos")
            boundaries = [
                start,
                *range((start // self.photos_per_shard + 1) * self.photos_per_shard, stop, self.photos_per_shard),
                stop,
            ]
            parts = [self.read(first, last - first) for first, last in pairwise(boundaries) if first < last]
            return np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *parts])[(slice(None), *entries)]
        if np.ndim(photos) == 0:
            if not 0 <= photos < len(self):
                raise IndexError(f"photo {photos} is out of range: the array has {len(self)}")  # ends a `for` loop
            return self.read(int(photos), 1)[0]
        photos = np.asarray(photos)
        if photos.dtype == bool or (len(photos) and not 0 <= photos.min() <= photos.max() < len(self)):
            raise IndexError(f"{photos}: give the indices of photos, from 0 to {len(self) - 1}")
        (entries,) = entries or [None]
        entries = [None] * len(photos) if entries is None else np.broadcast_to(entries, len(photos))
        return np.concatenate([self.read(int(photo), 1, entry) for photo, entry in zip(photos, entries, strict=True)])

    def read(self, photo: int, count: int, entry: int | None = None) -> np.ndarray:
        """Read `count` consecutive photos of one shard, starting at `photo`: (count, …).

        entry: read only this entry of the second axis; `count` is then 1.
        """
        shard, offset = divmod(photo, self.photos_per_shard)
        shape = self.shape[1:]
        if entry is not None:
            offset, shape = offset * shape[0] + int(entry), shape[1:]
        path, size = shard_path(self.folder, shard), math.prod(shape)
        if shard not in self.header_bytes:  # safetensors: 8 bytes with the length of the JSON, the JSON, the values
            with path.open("rb") as file:
                self.header_bytes[shard] = 8 + int.from_bytes(file.read(8), "little")
        start_byte = self.header_bytes[shard] + offset * size * self.dtype.itemsize
        return np.fromfile(path, self.dtype, count * size, offset=start_byte).reshape(count, *shape)


def cache_folder(key: str) -> Path:
    """Return the folder of the array with this key."""
    return CACHE_DIR / key


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


@explain_full_disk(CACHE_DIR, "HF_HOME")
def cached_array(
    key: str,
    shape: tuple[int, ...],
    dtype: type,
    compute: Callable[[slice], np.ndarray],
    description: str,
    share: Share = SINGLE_PROCESS,
    at_once: int = 256,
) -> ShardedArray:
    """Return the array with this key, and compute its missing shards first.

    Args:
        compute: takes a slice of photos and returns their values.
        description: the text of the progress bar.
        share: the place of this process. Each of its `num_processes` processes must call this function.
        at_once: `compute` gets at most this many photos per call.
    """
    folder, dtype = cache_folder(key), np.dtype(dtype)
    array = ShardedArray(folder, shape, dtype)
    photos_per_shard = array.photos_per_shard

    def fill(shards: range, hide_progress: bool, is_known: Callable[[Path], bool]) -> None:
        missing = [shard for shard in shards if not is_known(shard_path(folder, shard))]
        for shard in tqdm(
            missing, description, unit=" shards", leave=False, disable=hide_progress or not missing or None
        ):
            first, last = shard * photos_per_shard, min((shard + 1) * photos_per_shard, shape[0])
            parts = [compute(slice(start, min(start + at_once, last))) for start in range(first, last, at_once)]
            if parts[0].shape[1:] != tuple(shape[1:]):
                raise ValueError(f"{key}: values of shape {parts[0].shape[1:]} instead of {tuple(shape[1:])}")
            values = np.ascontiguousarray(np.concatenate(parts).astype(dtype, copy=False))
            with atomic_file(shard_path(folder, shard)) as temporary:
                save_file({"values": values}, temporary, metadata={"crc32": str(zlib.crc32(values))})

    num_shards = math.ceil(shape[0] / photos_per_shard)
    if share.process_index == 0:
        missing = sum(not shard_path(folder, shard).is_file() for shard in range(num_shards))
        num_bytes = math.prod(shape) * dtype.itemsize
        require_space(CACHE_DIR, "HF_HOME", missing * num_bytes // max(num_shards, 1))
    # each process checks the content of its own shards
    fill(range(share.process_index, num_shards, share.num_processes), share.process_index > 0, is_whole)
    share.wait_for_everyone()
    # No shard is missing now, unless this machine has fewer processes than `num_processes`.
    fill(range(num_shards), hide_progress=False, is_known=Path.is_file)
    return array


def is_whole(shard: Path) -> bool:
    """Return whether the file of a shard exists and its content fits the CRC-32 in its header.

    Shards of earlier versions have no CRC-32. They must be as long as their header says.
    """
    try:
        content = shard.read_bytes()
        header_end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:header_end])
        is_complete = len(content) == header_end + header["values"]["data_offsets"][1]
        crc = header.get("__metadata__", {}).get("crc32")
        return is_complete and (crc is None or int(crc) == zlib.crc32(memoryview(content)[header_end:]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return False


def digest(*parts: object) -> str:
    """Return a short hash of content: the first 24 hex digits of SHA-256 over the `repr` of the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def process_share(accelerator: Accelerator) -> Share:
    """Return the place of this process among the processes that fill the caches together.

    Each machine has its own caches. The processes of one machine divide the photos among them.
    """
    if accelerator.num_processes == 1:
        return SINGLE_PROCESS
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return Share(accelerator.local_process_index, processes, accelerator.wait_for_everyone)
