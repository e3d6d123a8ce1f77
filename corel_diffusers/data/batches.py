"""The training batches of each step and its random numbers.

The order of the photos depends on (seed, epoch). The random numbers of a photo depend on (seed, step, index in the
global batch). A resumed run therefore does not need the state of a random generator. It also does not matter how the
global batch is divided among devices and gradient accumulation steps, except for dropout: each forward pass draws its
own masks.
"""

import gc
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.mixed_sizes import Array, MixedArray, parts_of
from corel_diffusers.files import STOP_SIGNALS, stop_signals_blocked
from corel_diffusers.runtime.devices import to_device
from corel_diffusers.runtime.randomness import CPU, StepRandom

GOLDEN_RATIO = (5**0.5 - 1) / 2
BLOCK_STEPS = 4096
IN_MEMORY_BYTES = 2**27  # smaller arrays are kept in memory, which saves some file reads in each step


@dataclass
class BatchPlan:
    """The division of the photos into steps, forward passes and ranks.

    The photos form an endless stream: one permutation per epoch. Each step takes the next `global_batch` photos of the
    stream. All photos are therefore used equally often, and no batch is smaller than the others. A batch can contain
    photos of two epochs.

    With several image sizes, the photos of each size form a stream of their own, and each step takes photos of one
    size. The fraction of the steps with a size is the fraction of the photos with this size.
    """

    photos: int
    batch_size: int
    grad_accum: int
    num_processes: int
    rank: int
    seed: int
    photos_by_size: Sequence[np.ndarray] = ()  # the indices of the photos of each image size, if there are several

    @classmethod
    def of(cls, args: TrainingArguments, accelerator: Accelerator, photos_by_size: Sequence[np.ndarray]) -> "BatchPlan":
        photos, num_processes, rank = (
            sum(map(len, photos_by_size)),
            accelerator.num_processes,
            accelerator.process_index,
        )
        return cls(photos, args.batch_size, args.grad_accum, num_processes, rank, args.seed, photos_by_size)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.grad_accum * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.photos / self.global_batch)

    def epoch(self, step: int) -> int:
        """Return the epoch of the `step`-th step. Epochs and steps are counted from 1."""
        return math.ceil(step / self.steps_per_epoch)

    def ends_epoch(self, step: int, every_epochs: int = 1) -> bool:
        """Return whether an epoch ends with the `step`-th step and its number is a multiple of `every_epochs`."""
        return step % (every_epochs * self.steps_per_epoch) == 0

    def random(self, step: int, micro_step: int, device: torch.device = CPU) -> StepRandom:
        """Return the random numbers of one forward pass. `step` and `micro_step` start at 0."""
        return StepRandom(self.seed, step, self.global_batch, self.rows(micro_step), device)

    def rows(self, micro_step: int) -> slice:
        """Return the rows of the global batch for one forward pass of this rank. `micro_step` starts at 0."""
        start = (micro_step * self.num_processes + self.rank) * self.batch_size
        return slice(start, start + self.batch_size)

    def indices(self, step: int, micro_step: int) -> np.ndarray:
        """Return the indices of the photos of one forward pass: (batch_size,). `step` and `micro_step` start at 0."""
        rows = self.rows(micro_step)
        if len(self.photos_by_size) < 2:
            return self.stream(step, rows, self.photos)
        block, place = divmod(step, BLOCK_STEPS)
        sizes, earlier_steps = sizes_of_steps(tuple(map(len, self.photos_by_size)), block)
        photos = self.photos_by_size[sizes[place]]
        return photos[self.stream(int(earlier_steps[place]), rows, len(photos))]

    def stream(self, step: int, rows: slice, photos: int) -> np.ndarray:
        """Return the indices, below `photos`, of rows of the global batch of a step of an endless stream."""
        positions = np.arange(step * self.global_batch + rows.start, step * self.global_batch + rows.stop)
        return np.array([epoch_order(self.seed, pos // photos, photos)[pos % photos] for pos in positions])


@lru_cache(maxsize=4)
def sizes_of_steps(num_photos: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the image size of each step in a block, and the number of earlier steps of this size.

    The multiples of the golden ratio, modulo 1, fill the interval from 0 to 1 evenly (a low-discrepancy sequence). Each
    size has a part of the interval, so after any number of steps it has had its fraction of them.

    Args:
        num_photos: the number of photos of each image size.
        block: the index of the block. A block has BLOCK_STEPS steps.
    """
    limits = np.cumsum(num_photos)[:-1] / sum(num_photos)
    sizes = np.searchsorted(limits, np.arange((block + 1) * BLOCK_STEPS) * GOLDEN_RATIO % 1, side="right")
    before, last = sizes[:-BLOCK_STEPS], sizes[-BLOCK_STEPS:]
    is_size = last[:, None] == np.arange(len(num_photos))
    earlier = np.bincount(before, minlength=len(num_photos)) + np.cumsum(is_size, axis=0) - 1
    return last, earlier[np.arange(BLOCK_STEPS), last]


@lru_cache(maxsize=12)  # two epochs of each image size
def epoch_order(seed: int, epoch: int, photos: int) -> np.ndarray:
    """Return the order of the photos in one epoch: (photos,)."""
    return np.random.default_rng([seed, epoch]).permutation(photos)


class BatchOrder(Sampler):
    """The indices that each forward pass reads. It starts at step `first_step` and ends before step `last_step`.

    It yields one tuple per forward pass: the indices of the photos and, if `versions` is given, their versions.
    """

    def __init__(
        self, plan: BatchPlan, first_step: int, last_step: int, versions: Callable[[int], np.ndarray] | None
    ) -> None:
        self.plan, self.steps, self.versions = plan, range(first_step, last_step), versions

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        for step in self.steps:
            versions = (self.versions(step),) if self.versions else ()
            for micro_step in range(self.plan.grad_accum):
                yield self.plan.indices(step, micro_step), *(v[self.plan.rows(micro_step)] for v in versions)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.grad_accum


class ArrayBatches(Dataset):
    """Complete batches of several arrays. The index is a tuple from `BatchOrder`; the item has one tensor per array.

    Only the photos and versions of the batch are read.
    """

    def __init__(self, *arrays: Array | MixedArray) -> None:
        self.arrays = arrays

    def __getitem__(self, indices: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
        if all(isinstance(array, torch.Tensor) for array in self.arrays):  # of one image size: see `preload`
            indices = tuple(to_device(torch.from_numpy(values), self.arrays[0].device) for values in indices)
            return [array[indices] for array in self.arrays]
        return [self.values(array, *indices) for array in self.arrays]

    def values(self, array: Array | MixedArray, photos: np.ndarray, *versions: np.ndarray) -> torch.Tensor:
        """Return the values of the photos, or of one version of each photo."""
        if isinstance(array, MixedArray):  # all photos of a batch have the same size
            array, photos = array.located(photos)
        if isinstance(array, torch.Tensor):
            return array[tuple(to_device(torch.from_numpy(values), array.device) for values in (photos, *versions))]
        return torch.from_numpy(np.ascontiguousarray(array[(photos, *versions)]))


def preload(arrays: Sequence[Array | MixedArray], device: torch.device) -> Sequence[Array | MixedArray]:
    """Load the arrays into memory, if they are small enough. Otherwise return them unchanged.

    For a GPU they are loaded as tensors on the device, if they need at most a quarter of its free memory. For a CPU
    they are loaded as numpy arrays, if they have less than IN_MEMORY_BYTES in total.
    """
    size = sum(math.prod(part.shape) * part.dtype.itemsize for array in arrays for part in parts_of(array))
    on_gpu = device.type == "cuda"
    if size > (torch.cuda.mem_get_info(device)[0] / 4 if on_gpu else IN_MEMORY_BYTES):
        return arrays
    load = partial(load_tensor, device=device) if on_gpu else np.asarray
    return [array.map(load) if isinstance(array, MixedArray) else load(array) for array in arrays]


def load_tensor(array: Array, device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on the device."""
    tensor = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, device=device)
    for start in range(0, len(array), 1024):  # in parts: the array may be too large for the memory of the CPU
        tensor[start : start + 1024] = torch.from_numpy(np.ascontiguousarray(array[start : start + 1024]))
    return tensor


def training_batches(
    plan: BatchPlan,
    first_step: int,
    last_step: int | None,
    num_workers: int,
    *arrays: Array | MixedArray,
    versions: Callable[[int], np.ndarray] | None = None,
) -> Iterator[list[torch.Tensor]]:
    """Return an iterator over the batches of all forward passes: one tensor per array.

    Args:
        first_step: index of the first step, from 0.
        last_step: index of the step before which the iterator ends. None: the iterator does not end.
        num_workers: number of processes that read the arrays. It is ignored for tensors, which stay on their device.
        arrays: (photos, …), or (photos, versions, …) if `versions` is given.
        versions: takes the index of a step and returns the version of each photo of the global batch, (global_batch,).
    """
    order = BatchOrder(plan, first_step, last_step or sys.maxsize // plan.grad_accum, versions)
    dataset = ArrayBatches(*arrays)
    if not num_workers or isinstance(parts_of(arrays[0])[0], torch.Tensor):
        return map(dataset.__getitem__, order)
    # A worker inherits the garbage of this process. If it collects garbage that holds GPU memory, it is aborted.
    gc.collect()
    loader = DataLoader(
        dataset, sampler=order, batch_size=None, num_workers=num_workers, worker_init_fn=ignore_stop_signals
    )
    with stop_signals_blocked():  # otherwise one could kill a worker that does not ignore them yet
        return iter(loader)


def ignore_stop_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal. Workers go on: the run needs their batches until it has stopped."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
