"""What a step trains on and draws: the order of the photos, their batches, and the randomness.

Whatever is random in a step derives from (seed, step, place in the global batch), and the order of the photos from (seed,
epoch): a resumed run needs no generator's state, and how the global batch is divided into devices and accumulated passes
changes nothing but the masks of dropout, which each forward pass draws for itself.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from corel_diffusers.arguments import TrainingArguments
from corel_diffusers.data.cache import Shards

Array = Shards | np.ndarray | torch.Tensor
CPU = torch.device("cpu")
SMALL_BYTES = 2**27  # arrays so small are kept in memory, which saves some file reads in each step


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on the device. A GPU copies pinned memory while the CPU goes on; other memory it would make wait."""
    pinned = device.type == "cuda" and not values.is_cuda and not values.is_pinned()
    return (values.pin_memory() if pinned else values).to(device, non_blocking=device.type == "cuda")


class StepRandom:
    """Draws for the rows of one forward pass, as slices of draws for the whole global batch of a step.

    Also seeds the global generator of the CPU and of the device, from which dropout draws the masks of this pass: the same in a resumed
    run, and others where the global batch is divided into other passes.
    """

    def __init__(self, seed: int, step: int, global_batch: int, rows: slice, device: torch.device = CPU) -> None:
        first, second = (int(word) for word in np.random.SeedSequence([seed, step]).generate_state(2))
        torch.default_generator.manual_seed(second + rows.start)  # torch.manual_seed writes down the stack for GPUs not there: 1 ms
        if device.type == "cuda":
            torch.cuda.manual_seed(second + rows.start)
        self.generator = torch.Generator().manual_seed(first)
        self.global_batch, self.rows, self.device = global_batch, rows, device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values, (rows, *shape)."""
        return to_device(torch.randn(self.global_batch, *shape, generator=self.generator)[self.rows], self.device)

    def integers(self, high: int) -> torch.Tensor:
        """Whole numbers from 0 to high - 1, (rows,)."""
        return to_device(torch.randint(high, (self.global_batch,), generator=self.generator)[self.rows], self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform values from 0 to below 1, (rows, *shape)."""
        return to_device(torch.rand(self.global_batch, *shape, generator=self.generator)[self.rows], self.device)

    def chance(self, probability: float) -> torch.Tensor:
        """True with the probability, (rows,)."""
        return self.uniform() < probability


@dataclass
class BatchPlan:
    """How the stream of photos, one seeded permutation after another, is cut into steps, passes and ranks.

    A step takes the next `global_batch` photos of the stream, so every photo is seen equally often and no batch is short.
    """

    photos: int
    batch_size: int
    grad_accum: int
    num_processes: int
    rank: int
    seed: int

    @classmethod
    def of(cls, args: TrainingArguments, accelerator: Accelerator, photos: int) -> "BatchPlan":
        return cls(photos, args.batch_size, args.grad_accum, accelerator.num_processes, accelerator.process_index, args.seed)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.grad_accum * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.photos / self.global_batch)

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that the `step`-th step belonged to."""
        return math.ceil(step / self.steps_per_epoch)

    def ends_epoch(self, step: int, every: int = 1) -> bool:
        """Whether the `step`-th step is the last of an epoch, and of every so many epochs."""
        return step % (every * self.steps_per_epoch) == 0

    def rows(self, micro_step: int) -> slice:
        """The rows of the global batch that this rank handles in its `micro_step`-th forward pass."""
        start = (micro_step * self.num_processes + self.rank) * self.batch_size
        return slice(start, start + self.batch_size)

    def indices(self, step: int, micro_step: int) -> np.ndarray:
        """The photos of one forward pass, (batch_size,)."""
        rows = self.rows(micro_step)
        places = np.arange(step * self.global_batch + rows.start, step * self.global_batch + rows.stop)
        return np.array([epoch_order(self.seed, place // self.photos, self.photos)[place % self.photos] for place in places])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, photos: int) -> np.ndarray:
    """The order of the photos in one epoch, (photos,)."""
    return np.random.default_rng([seed, epoch]).permutation(photos)


class BatchOrder(Sampler):
    """What every forward pass from `first_step` to `last_step` reads, in order: photos, and where wanted a version of each."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int, versions: Callable[[int], np.ndarray] | None) -> None:
        self.plan, self.steps, self.versions = plan, range(first_step, last_step), versions

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        for step in self.steps:
            picked = (self.versions(step),) if self.versions else ()
            for micro in range(self.plan.grad_accum):
                yield self.plan.indices(step, micro), *(values[self.plan.rows(micro)] for values in picked)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.grad_accum


class ArrayBatches(Dataset):
    """Whole batches of cached arrays: indices into their first axes -> a tensor for each array. Nothing else is read."""

    def __init__(self, *arrays: Array) -> None:
        self.arrays = arrays

    def __getitem__(self, indices: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
        if isinstance(self.arrays[0], torch.Tensor):  # and so are the others
            indices = tuple(to_device(torch.from_numpy(places), self.arrays[0].device) for places in indices)
            return [array[indices] for array in self.arrays]
        return [torch.from_numpy(np.ascontiguousarray(array[indices])) for array in self.arrays]


def resident(arrays: Sequence[Array], device: torch.device) -> Sequence[Array]:
    """The arrays as tensors on the device, where they fill less than a quarter of what is free on a GPU; for a CPU, in memory where they
    are small. Else as they are."""
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    if device.type != "cuda":
        return [np.asarray(array) for array in arrays] if size < SMALL_BYTES else arrays
    if size > torch.cuda.mem_get_info(device)[0] / 4:
        return arrays
    kept = []
    for array in arrays:
        kept.append(torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, device=device))
        for start in range(0, len(array), 1024):  # in parts: the GPU has the room, the machine need not have it
            kept[-1][start : start + 1024] = torch.from_numpy(np.ascontiguousarray(array[start : start + 1024]))
    return kept


def batches(
    plan: BatchPlan,
    first_step: int,
    last_step: int | None,
    num_workers: int,
    *arrays: Array,
    versions: Callable[[int], np.ndarray] | None = None,
) -> Iterator[list[torch.Tensor]]:
    """The batches of every forward pass from `first_step` on, without an end where `last_step` is None.

    arrays: (photos, …); with `versions`, a step -> which one its global batch takes, (photos, versions, …). Those on a GPU are read there.
    """
    order = BatchOrder(plan, first_step, last_step or sys.maxsize // plan.grad_accum, versions)
    read = ArrayBatches(*arrays)
    if not num_workers or isinstance(arrays[0], torch.Tensor):
        return map(read.__getitem__, order)
    gc.collect()  # or a worker would do it: one that frees what this process left on a GPU is aborted
    return iter(DataLoader(read, sampler=order, batch_size=None, num_workers=num_workers))
