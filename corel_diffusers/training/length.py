"""Decide how long a run is, and when to validate, sample and save."""

import math
import time
from dataclasses import dataclass

from accelerate import Accelerator

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.files import UserError
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.training.state import RunState

SLOW_START_FRACTION = 0.2  # if preparing the photos takes more than this fraction of the minutes, print a notice
CHECKPOINT_SECONDS = 600  # maximum time between checkpoints, so a crash loses at most this much training
SYNC_EVERY = 10  # steps between two exchanges of the time and of stop signals among the ranks


@dataclass
class RunLength:
    """The length of a run: a number of steps or of seconds. The seconds include the time before a resume."""

    steps: int | None
    seconds: float | None
    began: float  # time.monotonic() at the start; for a resumed run, as if it had never been interrupted
    previous_seconds: float = math.inf  # state.seconds before the last tick

    @classmethod
    def of(
        cls, args: TrainingArguments, plan: BatchPlan, accelerator: Accelerator, state: RunState, began: float
    ) -> "RunLength":
        """Return the length that the flags give.

        Args:
            began: time.monotonic() at the start of this process.

        Raises:
            UserError: the minutes of the run are over before its first step.
        """
        if not args.max_train_minutes:
            return cls(args.max_train_steps or args.epochs * plan.steps_per_epoch, None, began - state.seconds)
        seconds, spent = 60 * args.max_train_minutes, broadcast_from_main(accelerator, time.monotonic() - began)
        duration = f"decoding and encoding the photos took {spent / 60:.1f} of the {args.max_train_minutes:g} minutes"
        if not state.step and spent >= seconds:
            raise UserError(
                f"--max-train-minutes {args.max_train_minutes:g}: {duration}; the result is cached: "
                "start the same command again"
            )
        if not state.step and spent > SLOW_START_FRACTION * seconds:
            accelerator.print(
                f"notice: {duration}; the result is cached: "
                "if you start the same command again, it has all its minutes for training"
            )
        return cls(None, seconds, began - state.seconds)

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


def checkpoint_due(args: TrainingArguments, plan: BatchPlan, state: RunState, length: RunLength) -> bool:
    """Return whether to save a checkpoint after this step.

    --checkpoint-every is the number of epochs between checkpoints. If it is unset, a checkpoint is saved every ten
    minutes. A run that ends by time then saves one after each tenth of its time, if that is sooner. Any other run also
    saves one every CHECKPOINT_EVERY epochs.
    """
    if args.checkpoint_every:
        return plan.ends_epoch(state.step, args.checkpoint_every)
    interval = min(length.seconds / 10, CHECKPOINT_SECONDS) if length.seconds else CHECKPOINT_SECONDS
    interval_passed = state.seconds // interval > length.previous_seconds // interval
    return interval_passed or (not length.seconds and plan.ends_epoch(state.step, args.CHECKPOINT_EVERY))


def samples_due(
    args: TrainingArguments, epoch: int, validate_every: int, length: RunLength, state: RunState, history: list[dict]
) -> bool:
    """Return whether this validation also writes samples.

    It does so every --sample-every epochs (default: 10). A run that ends by time has samples after each tenth of its
    time by default.
    """
    if args.sample_every or not length.seconds:
        return epoch % (args.sample_every or 10) < validate_every
    previous_seconds = history[-1]["seconds"] if history else 0.0
    return 10 * state.seconds // length.seconds > 10 * previous_seconds // length.seconds


def epochs_between_validations(args: TrainingArguments, plan: BatchPlan, forward_passes: int) -> int:
    """Return the number of epochs between two validations: --validate-every, if it is set.

    Otherwise it is the smallest number for which validation takes 3 % of the time or less. The cost of a training step
    is counted as three forward passes per photo. A run with a length in epochs or steps has at least ten validations,
    even if they take more time.

    Args:
        forward_passes: number of photos that each rank runs through the model in one validation.
    """
    every = math.ceil(forward_passes * plan.num_processes / (0.03 * 3 * plan.steps_per_epoch * plan.global_batch))
    epochs = math.ceil(args.max_train_steps / plan.steps_per_epoch) if args.max_train_steps else args.epochs
    return args.validate_every or (every if args.max_train_minutes else min(every, max(1, epochs // 10)))
