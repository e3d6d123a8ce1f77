"""The order of the photos and the randomness of a step: however a batch is divided, and wherever the arrays are."""

import gc
import os

import numpy as np
import pytest
import torch

from corel_diffusers.batches import BatchPlan, StepRandom, batches, resident
from corel_diffusers.data.cache import cached_array


def test_every_photo_is_seen_equally_often_in_a_new_order_each_epoch():
    plan = BatchPlan(photos=10, batch_size=4, grad_accum=1, num_processes=1, rank=0, seed=5)
    stream = np.concatenate([plan.indices(step, 0) for step in range(25)])
    assert (np.bincount(stream) == 10).all()
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:20])
    assert plan.steps_per_epoch == 3


@pytest.mark.parametrize(("batch_size", "grad_accum", "num_processes"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_the_global_batch_and_its_draws_do_not_depend_on_how_it_is_divided(batch_size, grad_accum, num_processes):
    whole = BatchPlan(11, 8, 1, 1, 0, seed=1)
    for step in (0, 3):
        indices, draws = np.zeros(8, int), torch.zeros(8, 2)
        for rank in range(num_processes):
            plan = BatchPlan(11, batch_size, grad_accum, num_processes, rank, seed=1)
            for micro in range(grad_accum):
                rows = plan.rows(micro)
                indices[rows] = plan.indices(step, micro)
                draws[rows] = StepRandom(1, step, plan.global_batch, rows).normal(2)
        assert (indices == whole.indices(step, 0)).all()
        assert torch.equal(draws, StepRandom(1, step, 8, slice(0, 8)).normal(2))


def test_arrays_that_stay_on_a_device_give_the_batches_of_those_on_the_disk():
    arrays = np.arange(11 * 4 * 3).reshape(11, 4, 3), np.broadcast_to(np.arange(11)[:, None], (11, 4))
    plan = BatchPlan(11, 2, 2, 2, 1, seed=1)
    versions = [np.random.default_rng(step).integers(4, size=8) for step in range(6)]
    read = [
        list(batches(plan, 2, 6, workers, *kind, versions=versions.__getitem__))
        for kind, workers in ((arrays, 0), (arrays, 1), ([torch.from_numpy(array.copy()) for array in arrays], 0))
    ]
    assert len(read[0]) == 8, "two passes a step, from the third step on"
    for passes in zip(*read, strict=True):
        for tensors in zip(*passes, strict=True):
            assert torch.equal(tensors[0], tensors[1])
            assert torch.equal(tensors[0], tensors[2])
    rows, indices = plan.rows(1), plan.indices(3, 1)
    assert np.array_equal(read[0][3][0], arrays[0][indices, versions[3][rows]])
    assert np.array_equal(read[0][3][1], indices)


class Collecting(np.ndarray):
    """An array; whoever reads it collects garbage first."""

    def __getitem__(self, places: object) -> np.ndarray:
        gc.collect()
        return super().__getitem__(places)


def test_workers_free_nothing_that_the_main_process_left(tmp_path):
    class Left:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Left()
        assert len(list(batches(BatchPlan(4, 2, 1, 1, 0, seed=1), 0, 2, 1, np.zeros((4, 2)).view(Collecting)))) == 2
    finally:
        gc.enable()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_small_arrays_are_read_from_memory(monkeypatch):
    array = cached_array("small", (5, 2), np.float32, lambda photos: np.arange(10, dtype=np.float32).reshape(5, 2)[photos], "making")
    (kept,) = resident([array], torch.device("cpu"))
    assert isinstance(kept, np.ndarray)
    assert np.array_equal(kept, array[:])
    monkeypatch.setattr("corel_diffusers.batches.SMALL_BYTES", 39)
    assert resident([array], torch.device("cpu")) == [array], "a larger one is left on the disk"


@pytest.mark.gpu
def test_arrays_stay_on_a_gpu_that_has_room():
    values = np.arange(24).reshape(6, 2, 2)
    (kept,) = resident([values], torch.device("cuda"))
    assert kept.is_cuda
    assert np.array_equal(kept.cpu(), values)


def test_draws_differ_from_step_to_step_and_seed_to_seed():
    def first(seed, step):
        return float(StepRandom(seed, step, 1, slice(0, 1)).normal(1))

    assert len({first(seed, step) for seed in range(4) for step in range(4)}) == 16


def test_dropout_is_the_same_in_a_resumed_pass_and_another_in_another_division():
    def mask(rows):
        StepRandom(seed=1, step=5, global_batch=8, rows=rows)
        return torch.nn.functional.dropout(torch.ones(4, 100), 0.5)

    assert torch.equal(mask(slice(4, 8)), mask(slice(4, 8)))
    assert not torch.equal(mask(slice(4, 8)), mask(slice(0, 4)))
