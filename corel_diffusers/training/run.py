"""What a training run is, apart from its models and its photos."""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.training.length import RunLength
from corel_diffusers.training.optimizers import SkippedSteps
from corel_diffusers.training.running_mean import RunningMean
from corel_diffusers.training.state import RunState
from corel_diffusers.training.stopping import StopSignal


@dataclass
class Run:
    """The settings and the progress of a training run. It has no model and does no work.

    The scripts read and change its values directly. The functions of `training/` take it when they need several of its
    values.
    """

    args: VAEArguments | UNetArguments  # the flags, with a value for each flag that the user left unset
    accelerator: Accelerator
    plan: BatchPlan  # the division of the photos into steps
    settings: dict  # what must not change when the run is resumed, see `resume.run_settings`
    checkpoint: Path | None  # where the run is resumed from
    state: RunState  # what a checkpoint stores, apart from the weights
    length: RunLength
    means: RunningMean  # the training metrics since the last validation
    stop: StopSignal = field(default_factory=StopSignal)
    history: list[dict] = field(default_factory=list)  # the records of metrics.jsonl
    validate_every: int = 1  # epochs between validations
    bar: tqdm | None = None
    skipped: SkippedSteps = field(default_factory=SkippedSteps)

    @property
    def epoch(self) -> int:
        """The number of the current epoch, from 1."""
        return self.plan.epoch(self.state.step)

    @property
    def total_steps(self) -> int:
        """The number of steps of the full run. If its length is in minutes, this is an estimate from the speed."""
        return self.length.total_steps(self.state)

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended as planned, or early by its own rules, and not by a signal."""
        return self.is_over or bool(self.state.stop_reason)

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its length."""
        return self.length.reached(self.state)
