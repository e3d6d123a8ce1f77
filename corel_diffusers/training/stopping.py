"""Stop a run early, or on a signal."""

import os
import sys
import time
from contextlib import AbstractContextManager

import numpy as np
import torch
from accelerate import Accelerator

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.files import best_record, handling_signals
from corel_diffusers.training.length import SYNC_EVERY
from corel_diffusers.training.state import RunState

# A run with --max-train-minutes stops early if no model was saved as best for this fraction of its minutes. In the
# measured runs, a gauge that had risen above SAVE_UP_TO_GAUGE times its minimum stayed above it.
STOP_AFTER_IDLE = 0.1
SAME_SIGNAL_SECONDS = 0.5


def stop_reason(args: UNetArguments, state: RunState, history: list[dict]) -> str:
    """Return the reason to stop the run before its end, or ""."""
    if args.early_stopping_patience is None:
        # A run that ends by time has no patience: its learning rate falls until the end, so its loss can fall late.
        best_seconds = best_record(history)["seconds"] if history else 0.0
        if history and history[-1]["seconds"] - best_seconds > STOP_AFTER_IDLE * 60 * args.max_train_minutes:
            return (
                "the model memorises the photos, and no later model would be saved as best; "
                "give --early-stopping-patience 0 to continue"
            )
    return early_stop_reason(state, args.early_stopping_patience, args.oscillation_window, args.oscillation_threshold)


def early_stop_reason(state: RunState, patience: int | None, window: int, threshold: float) -> str:
    """Return the reason to stop the run now, or "".

    The first reason is that `patience` validations have passed without a lower loss. The second reason is that the loss
    oscillates without falling: within the last `window` validations it changed direction at least window / 2 times, and
    the minimum of their second half is at most `threshold` below the minimum of their first half.

    `update_early_stopping` records the losses in the state.
    """
    if patience and state.validations_waited >= patience:
        return f"no lower loss in {patience} validations; give --early-stopping-patience 0 to continue"
    if window and len(state.recent) == window:
        changes = np.sign(np.diff(state.recent))
        turns = int((changes[1:] * changes[:-1] < 0).sum())
        fall = min(state.recent[: window // 2]) - min(state.recent[window // 2 :])
        if turns >= window / 2 and fall <= threshold:
            return (
                "the validation loss oscillates without falling "
                f"({turns} turns in {window} validations, fell by {fall:.2g})"
            )
    return ""


class StopSignal:
    """Lets the run save a checkpoint and end cleanly after the first of STOP_SIGNALS.

    A second signal ends the run at once.
    """

    def __init__(self) -> None:
        self.number = 0  # the signal number that this process received; 0: none
        self.received_at = 0.0  # time.monotonic() of that signal
        self.agreed = 0  # the signal number that all ranks agreed on: above 0 if any rank received one

    def listening(self) -> AbstractContextManager:
        """Wait for signals inside this context. A run in another thread than the main one cannot be stopped by them."""
        return handling_signals(self._received)

    def _received(self, number: int, frame: object) -> None:
        now = time.monotonic()
        # the system and the parent process can both send one: that is not a second signal
        if self.number and now - self.received_at > SAME_SIGNAL_SECONDS:
            sys.exit(128 + number)
        if not self.number:
            os.write(2, b"\nstopping: the step ends, then a checkpoint is saved (a second signal stops at once)\n")
        self.number, self.received_at = self.number or number, self.received_at or now

    def received(self, accelerator: Accelerator, state: RunState) -> bool:
        """Return whether any rank has received a signal. The answer is the same on all ranks.

        Several ranks exchange the signal every SYNC_EVERY steps. At the other steps the answer is False.
        """
        if accelerator.num_processes > 1 and state.step % SYNC_EVERY:
            return False
        self.agree(accelerator)
        return bool(self.agreed)

    def agree(self, accelerator: Accelerator) -> None:
        """Exchange the signal among the ranks."""
        self.agreed = self.number
        if accelerator.num_processes > 1:
            self.agreed = int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())

    def exit(self, state: RunState, is_complete: bool) -> None:
        """If a signal was received, print how to continue, and exit with the exit code of the signal."""
        if self.agreed:
            ending = "the run is complete" if is_complete else "a checkpoint is saved: give --resume latest to continue"
            print(f"stopped at step {state.step}, {ending}", file=sys.stderr)
            sys.exit(128 + self.agreed)


def update_early_stopping(state: RunState, loss: float, delta: float = 0.0, window: int = 0) -> None:
    """Record the loss of a validation for `early_stop_reason`. It counts as lower only if it is lower by `delta`."""
    state.recent = [*state.recent, loss][-window:] if window else []
    state.validations_waited += 1
    if loss < state.to_beat - delta:
        state.to_beat, state.validations_waited = loss, 0


def update_best_loss(state: RunState, loss: float) -> bool:
    """Record a held-out loss in the state, and return whether it is the lowest so far."""
    is_lowest = loss < state.best
    if is_lowest:
        state.best = loss
    return is_lowest
