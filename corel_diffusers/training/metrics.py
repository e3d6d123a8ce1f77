"""Average, print and log the metrics of a run."""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.files import UserError
from corel_diffusers.training.length import RunLength
from corel_diffusers.training.state import RunState


class RunningMean:
    """The mean of each named value over the forward passes of an epoch that had this value.

    The sums stay on the device, so the CPU does not wait for it until the means are read.
    """

    def __init__(self, state: RunState, device: torch.device) -> None:
        self.sums = {name: (torch.tensor(total, device=device), passes) for name, (total, passes) in state.sums.items()}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            total, passes = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value.detach().float(), passes + 1

    def store(self, state: RunState, accelerator: Accelerator) -> None:
        """Store the sums so far, averaged over the ranks, in the state. A checkpoint in mid-epoch needs them."""
        state.sums = {
            name: (float(accelerator.reduce(total, "mean")), passes) for name, (total, passes) in self.sums.items()
        }

    def means(self) -> dict[str, float]:
        """Return the means of this rank so far."""
        return {name: float(total) / passes for name, (total, passes) in self.sums.items()}

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all ranks, and start again from zero."""
        means = {name: float(accelerator.reduce(total / passes, "mean")) for name, (total, passes) in self.sums.items()}
        self.sums = {}
        return means


def append_metrics(path: Path, record: dict) -> None:
    """Append one line to metrics.jsonl. It is written in one call, so a reader sees a complete line or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def progress_bar(plan: BatchPlan, state: RunState, length: RunLength, accelerator: Accelerator) -> tqdm:
    """Return a progress bar with photos per second and the time left. It adds a line every 30 seconds to a log file."""
    return tqdm(
        total=length.steps and length.steps * plan.global_batch,
        initial=state.step * plan.global_batch,
        unit=" photos",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )


def show_progress(
    bar: tqdm, plan: BatchPlan, state: RunState, length: RunLength, means: RunningMean, args: TrainingArguments
) -> None:
    """Move the bar by one step. The first three steps and every tenth step also update the losses of the epoch so far.

    Raises:
        UserError: one of these losses is NaN or infinite.
    """
    if state.step % 10 == 0 or state.step <= 3:
        bar.total = length.total_steps(state) * plan.global_batch
        losses = means.means()
        bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()}, refresh=False)
        if not all(map(math.isfinite, losses.values())):
            hint = f"try --lr {args.learning_rate / 3:.1g} (was {args.learning_rate:g}) with another --output-dir"
            raise UserError(f"the loss is NaN or infinite at step {state.step}: {hint}")
    bar.update(plan.global_batch)


def log_validation(
    accelerator: Accelerator,
    args: TrainingArguments,
    plan: BatchPlan,
    state: RunState,
    history: list[dict],
    bar: tqdm,
    values: dict[str, float],
    is_printed: bool,
    not_printed: Sequence[str] = (),
) -> None:
    """Add the values of a validation to the history, to metrics.jsonl and to the trackers. Print them if `is_printed`.

    Args:
        not_printed: names of values that are left out of the printed line. Their measurement differs from that of the
            values beside them, so a comparison would mislead.
    """
    epoch = plan.epoch(state.step)
    progress = {
        "step": state.step,
        "epoch": epoch,
        "images_seen": state.step * plan.global_batch,
        "seconds": round(state.seconds, 3),
    }
    history.append(progress | {name: float(f"{value:.6g}") for name, value in values.items()})
    accelerator.log(values, step=state.step)
    if accelerator.is_main_process:
        append_metrics(args.run_dir / "metrics.jsonl", history[-1])
        if is_printed:
            # names with a number at the end are bands of timesteps, which only the plot shows
            printed = {
                name: value
                for name, value in values.items()
                if not re.search(r"_\d$", name) and name not in not_printed
            }
            bar.write(
                f"epoch {epoch}: "
                + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in printed.items())
            )
