"""The mean of each training metric since the last validation."""

import torch
from accelerate import Accelerator

from corel_diffusers.training.state import RunState


class RunningMean:
    """The mean of each named value over the forward passes of an epoch that had this value.

    The sums stay on the device, so the CPU does not wait for it until the means are read.
    """

    def __init__(self, state: RunState, device: torch.device) -> None:
        self.sums = {name: (torch.tensor(total, device=device), passes) for name, (total, passes) in state.sums.items()}

    def add(self, **values: torch.Tensor) -> None:
        """Add the values of one forward pass. NaN and infinite values count as 0: their step is skipped."""
        for name, value in values.items():
            total, passes = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value.detach().float().nan_to_num(0.0, 0.0, 0.0), passes + 1

    def store(self, state: RunState, accelerator: Accelerator) -> None:
        """Store the sums so far, averaged over the ranks, in the state. A checkpoint in mid-epoch needs them."""
        state.sums = {
            name: [float(accelerator.reduce(total, "mean")), passes] for name, (total, passes) in self.sums.items()
        }

    def means(self) -> dict[str, float]:
        """Return the means of this rank so far."""
        return {name: float(total) / passes for name, (total, passes) in self.sums.items()}

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all ranks, and start again from zero."""
        means = {name: float(accelerator.reduce(total / passes, "mean")) for name, (total, passes) in self.sums.items()}
        self.sums = {}
        return means
