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
from functools import lru_cache

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.cache import ShardedArray
from corel_diffusers.runtime.devices import to_device
from corel_diffusers.runtime.processes import STOP_SIGNALS
from corel_diffusers.runtime.randomness import CPU, StepRandom

Array = ShardedArray | np.ndarray | torch.Tensor
IN_MEMORY_BYTES = 2**27  # smaller arrays are kept in memory, which saves some file reads in each step


@dataclass
class BatchPlan:
    """The division of the photos into steps, forward passes and ranks.

    The photos form an endless stream: one permutation per epoch. Each step takes the next `global_batch` photos of the
    stream. All photos are therefore used equally often, and no batch is smaller than the others. A batch can contain
    photos of two epochs.
    """

    photos: int
    batch_size: int
    grad_accum: int
    num_processes: int
    rank: int
    seed: int

    @classmethod
    def of(cls, args: TrainingArguments, accelerator: Accelerator, photos: int) -> "BatchPlan":
        return cls(
            photos, args.batch_size, args.grad_accum, accelerator.num_processes, accelerator.process_index, args.seed
        )

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
        positions = np.arange(step * self.global_batch + rows.start, step * self.global_batch + rows.stop)
        return np.array(
            [epoch_order(self.seed, pos // self.photos, self.photos)[pos % self.photos] for pos in positions]
        )


@lru_cache(maxsize=4)
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

    def __init__(self, *arrays: Array) -> None:
        self.arrays = arrays

    def __getitem__(self, indices: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
        if isinstance(self.arrays[0], torch.Tensor):  # then all arrays are tensors, see `preload`
            indices = tuple(to_device(torch.from_numpy(values), self.arrays[0].device) for values in indices)
            return [array[indices] for array in self.arrays]
        return [torch.from_numpy(np.ascontiguousarray(array[indices])) for array in self.arrays]


def preload(arrays: Sequence[Array], device: torch.device) -> Sequence[Array]:
    """Load the arrays into memory, if they are small enough. Otherwise return them unchanged.

    For a GPU they are loaded as tensors on the device, if they need at most a quarter of its free memory. For a CPU
    they are loaded as numpy arrays, if they have less than IN_MEMORY_BYTES in total.
    """
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    if device.type != "cuda":
        return [np.asarray(array) for array in arrays] if size < IN_MEMORY_BYTES else arrays
    if size > torch.cuda.mem_get_info(device)[0] / 4:
        return arrays
    tensors = []
    for array in arrays:
        tensors.append(torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, device=device))
        for start in range(0, len(array), 1024):  # in parts: the array may be too large for the memory of the CPU
            tensors[-1][start : start + 1024] = torch.from_numpy(np.ascontiguousarray(array[start : start + 1024]))
    return tensors


def training_batches(
    plan: BatchPlan,
    first_step: int,
    last_step: int | None,
    num_workers: int,
    *arrays: Array,
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
    if not num_workers or isinstance(arrays[0], torch.Tensor):
        return map(dataset.__getitem__, order)
    # A worker inherits the garbage of this process. If it collects garbage that holds GPU memory, it is aborted.
    gc.collect()
    loader = DataLoader(
        dataset, sampler=order, batch_size=None, num_workers=num_workers, worker_init_fn=ignore_stop_signals
    )
    return iter(loader)


def ignore_stop_signals(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal. Workers go on: the run needs their batches until it has stopped."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
