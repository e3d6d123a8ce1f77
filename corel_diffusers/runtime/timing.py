"""Time training steps."""

import time
from collections.abc import Callable

import torch

MIN_SPEEDUP = 1.05  # a ratio of speeds: repeated timings on an idle machine differ by less


def photos_per_second(step: Callable[[], None], batch_size: int, seconds: float = 1.0) -> float:
    """Return the speed of training steps in photos per second, measured over `seconds` after one warm-up step."""

    def run(min_seconds: float) -> tuple[int, float]:
        steps, began = 0, time.perf_counter()
        while not steps or time.perf_counter() - began < min_seconds:
            step()
            steps += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return steps, time.perf_counter() - began

    run(0)
    steps, elapsed_seconds = run(seconds)
    return steps * batch_size / elapsed_seconds
