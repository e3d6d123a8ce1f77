"""The order of the photos and the random numbers of a step.

They must not depend on how the global batch is divided or on where the arrays are stored.
"""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from corel_diffusers.data.batches import BatchPlan, preload, training_batches
from corel_diffusers.data.cache import cached_array
from corel_diffusers.runtime.randomness import StepRandom


def test_all_photos_are_used_equally_often_and_each_epoch_has_a_new_order():
    plan = BatchPlan(photos=10, batch_size=4, grad_accum=1, num_processes=1, rank=0, seed=5)
    stream = np.concatenate([plan.indices(step, 0) for step in range(25)])
    assert (np.bincount(stream) == 10).all()
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:20])
    assert plan.steps_per_epoch == 3


@pytest.mark.parametrize(("batch_size", "grad_accum", "num_processes"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_the_global_batch_and_its_random_numbers_do_not_depend_on_the_division(batch_size, grad_accum, num_processes):
    single = BatchPlan(11, 8, 1, 1, 0, seed=1)
    for step in (0, 3):
        indices, noise = np.zeros(8, int), torch.zeros(8, 2)
        for rank in range(num_processes):
            plan = BatchPlan(11, batch_size, grad_accum, num_processes, rank, seed=1)
            for micro_step in range(grad_accum):
                rows = plan.rows(micro_step)
                indices[rows] = plan.indices(step, micro_step)
                noise[rows] = StepRandom(1, step, plan.global_batch, rows).normal(2)
        assert (indices == single.indices(step, 0)).all()
        assert torch.equal(noise, StepRandom(1, step, 8, slice(0, 8)).normal(2))


def test_batches_of_tensors_and_of_workers_equal_batches_of_numpy_arrays():
    arrays = np.arange(11 * 4 * 3).reshape(11, 4, 3), np.broadcast_to(np.arange(11)[:, None], (11, 4))
    plan = BatchPlan(11, 2, 2, 2, 1, seed=1)
    versions = [np.random.default_rng(step).integers(4, size=8) for step in range(6)]
    batches = [
        list(training_batches(plan, 2, 6, num_workers, *source, versions=versions.__getitem__))
        for source, num_workers in ((arrays, 0), (arrays, 1), ([torch.from_numpy(array.copy()) for array in arrays], 0))
    ]
    assert len(batches[0]) == 8, "four steps (the third to the sixth) with two forward passes per step"
    for batch_of_each in zip(*batches, strict=True):
        for tensors in zip(*batch_of_each, strict=True):
            assert torch.equal(tensors[0], tensors[1])
            assert torch.equal(tensors[0], tensors[2])
    rows, indices = plan.rows(1), plan.indices(3, 1)
    assert np.array_equal(batches[0][3][0], arrays[0][indices, versions[3][rows]])
    assert np.array_equal(batches[0][3][1], indices)


SIGNAL_WHILE_WORKERS_START = """
import multiprocessing
import os
import signal

import numpy as np

from corel_diffusers.data.batches import BatchPlan, training_batches
from corel_diffusers.files import STOP_SIGNALS, handling_signals

if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    received, handled = [], [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    with handling_signals(lambda number, frame: received.append(number)):
        batches = training_batches(BatchPlan(8, 2, 1, 1, 0, seed=0), 0, 4, 1, np.arange(8))
        for number in STOP_SIGNALS:
            os.killpg(0, number)
        print(len(list(batches)), sorted(received) == sorted(handled))
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no process groups")
@pytest.mark.parametrize("method", ["fork", "spawn"])  # of Linux and of macOS
def test_stop_signals_to_the_whole_group_do_not_end_a_worker_that_starts(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SIGNAL_WHILE_WORKERS_START.format(method=method))
    words = [sys.executable, script]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "4 True\n"), done.stderr
    assert "Traceback" not in done.stderr, "multiprocessing's tracker goes on as well"


class CollectingArray(np.ndarray):
    """An array that collects garbage each time it is read."""

    def __getitem__(self, indices: object) -> np.ndarray:
        gc.collect()
        return super().__getitem__(indices)


def test_workers_do_not_collect_garbage_of_the_main_process(tmp_path):
    class Garbage:
        def __init__(self) -> None:
            self.cycle = self  # only the garbage collector can free a reference cycle

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Garbage()
        assert (
            len(
                list(
                    training_batches(BatchPlan(4, 2, 1, 1, 0, seed=1), 0, 2, 1, np.zeros((4, 2)).view(CollectingArray))
                )
            )
            == 2
        )
    finally:
        gc.enable()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_small_arrays_are_kept_in_memory(monkeypatch):
    array = cached_array(
        "small", (5, 2), np.float32, lambda photos: np.arange(10, dtype=np.float32).reshape(5, 2)[photos], "computing"
    )
    (preloaded,) = preload([array], torch.device("cpu"))
    assert isinstance(preloaded, np.ndarray)
    assert np.array_equal(preloaded, array[:])
    monkeypatch.setattr("corel_diffusers.data.batches.IN_MEMORY_BYTES", 39)
    assert preload([array], torch.device("cpu")) == [array], "a larger array is not loaded"


@pytest.mark.gpu
def test_arrays_are_loaded_onto_a_gpu_with_enough_memory():
    values = np.arange(24).reshape(6, 2, 2)
    (preloaded,) = preload([values], torch.device("cuda"))
    assert preloaded.is_cuda
    assert np.array_equal(preloaded.cpu(), values)


def test_each_step_and_each_seed_has_other_random_numbers():
    def first_value(seed, step):
        return float(StepRandom(seed, step, 1, slice(0, 1)).normal(1))

    assert len({first_value(seed, step) for seed in range(4) for step in range(4)}) == 16


def test_dropout_masks_are_the_same_in_a_resumed_run_and_differ_between_forward_passes():
    def mask(rows):
        StepRandom(seed=1, step=5, global_batch=8, rows=rows)
        return torch.nn.functional.dropout(torch.ones(4, 100), 0.5)

    assert torch.equal(mask(slice(4, 8)), mask(slice(4, 8)))
    assert not torch.equal(mask(slice(4, 8)), mask(slice(0, 4)))
