"""The random numbers of a training step."""

import numpy as np
import torch

from corel_diffusers.runtime.devices import to_device

CPU = torch.device("cpu")


class StepRandom:
    """Random numbers for the photos of one forward pass.

    Each method draws for the full global batch of the step and returns the rows of this forward pass.

    The constructor also seeds the global generators of the CPU and of the device, because dropout draws its masks from
    them. The masks are the same in a resumed run. They differ if the global batch is divided into other forward passes.

    Args:
        global_batch: number of photos in the global batch.
        rows: the rows of the global batch that belong to this forward pass, see `BatchPlan.rows` in data/batches.py.
    """

    def __init__(self, seed: int, step: int, global_batch: int, rows: slice, device: torch.device = CPU) -> None:
        draws_seed, dropout_seed = (int(word) for word in np.random.SeedSequence([seed, step]).generate_state(2))
        # torch.manual_seed takes 1 ms: without a GPU, it records the stack trace to seed the GPUs later
        torch.default_generator.manual_seed(dropout_seed + rows.start)
        if device.type == "cuda":
            torch.cuda.manual_seed(dropout_seed + rows.start)
        self.generator = torch.Generator().manual_seed(draws_seed)
        self.global_batch, self.rows, self.device = global_batch, rows, device

    def normal(self, *shape: int) -> torch.Tensor:
        """Return standard normal values: (B, *shape)."""
        return to_device(torch.randn(self.global_batch, *shape, generator=self.generator)[self.rows], self.device)

    def integers(self, high: int) -> torch.Tensor:
        """Return integers from 0 to high - 1: (B,)."""
        return to_device(torch.randint(high, (self.global_batch,), generator=self.generator)[self.rows], self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return uniform values in [0, 1): (B, *shape)."""
        return to_device(torch.rand(self.global_batch, *shape, generator=self.generator)[self.rows], self.device)

    def chance(self, probability: float) -> torch.Tensor:
        """Return booleans that are True with this probability: (B,)."""
        return self.uniform() < probability
