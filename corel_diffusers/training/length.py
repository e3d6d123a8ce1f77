"""The length of a run."""

import math
import time
from dataclasses import dataclass

from accelerate import Accelerator

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.training.state import RunState

SLOW_START_FRACTION = 0.2  # if the start takes more than this fraction of the minutes, print a notice
MIN_TRAINING_FRACTION = 0.5  # of the minutes, in which the run trains, however long its start takes
SYNC_EVERY = 10  # steps between two exchanges of the time and of stop signals among the ranks


@dataclass
class RunLength:
    """The length of a run: a number of steps or of seconds. The seconds include the time before a resume."""

    steps: int | None
    seconds: float | None
    began: float  # time.monotonic() at the start; for a resumed run, as if it had never been interrupted
    previous_seconds: float = math.inf  # state.seconds before the last tick

    @classmethod
    def of(cls, args: TrainingArguments, plan: BatchPlan, state: RunState, began: float) -> "RunLength":
        """Return the length that the flags give.

        Args:
            began: time.monotonic() at the start of this process.
        """
        if args.max_train_minutes:
            return cls(None, 60 * args.max_train_minutes, began - state.seconds)
        return cls(args.max_train_steps or args.epochs * plan.steps_per_epoch, None, began - state.seconds)

    def allow_slow_start(self, state: RunState, accelerator: Accelerator) -> None:
        """Print a notice if the start took a large part of the time of the run, and leave at least half of it.

        The start is all that comes before the first step: imports, decoding and encoding photos, and the plan. On a
        slow machine it could take all of a few minutes.
        """
        if not self.seconds or state.step:
            return
        spent = broadcast_from_main(accelerator, time.monotonic() - self.began)
        late = max(0.0, spent - (1 - MIN_TRAINING_FRACTION) * self.seconds)
        self.began += late
        if spent > SLOW_START_FRACTION * self.seconds:
            line = f"the start (decoding photos, planning) took {spent / 60:.1f} of the {self.seconds / 60:.3g} minutes"
            line += f", so the run takes {late / 60:.1f} more" if late else ""
            accelerator.print(f"notice: {line}; the photos are cached: the start of another run is faster")

    def tick(self, state: RunState, accelerator: Accelerator) -> None:
        """Update the elapsed time in the state, after each step.

        The time decides about checkpoints and the end of the run, so all ranks must have the same time. With several
        ranks, they get the time of the main process every SYNC_EVERY steps.
        """
        self.previous_seconds = state.seconds
        if accelerator.num_processes == 1:
            state.seconds = time.monotonic() - self.began
        elif state.step % SYNC_EVERY == 0:
            state.seconds = broadcast_from_main(accelerator, time.monotonic() - self.began)

    def total_steps(self, state: RunState) -> int:
        """Return the number of steps of the full run. If the run ends by time, estimate it from the speed so far."""
        return self.steps or max(state.step + 1, round(state.step * self.seconds / max(state.seconds, 1e-9)))

    def fraction_done(self, state: RunState) -> float:
        """Return the fraction of the run that is done, from 0 to 1."""
        return state.step / self.steps if self.steps else state.seconds / self.seconds

    def reached(self, state: RunState) -> bool:
        """Return whether the run has reached its end."""
        return self.fraction_done(state) >= 1
