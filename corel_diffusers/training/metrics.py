"""Show the progress of a run, and log its metrics."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from corel_diffusers.files import explain_full_disk
from corel_diffusers.plots import save_image
from corel_diffusers.training.run import Run
from corel_diffusers.training.trackers import log_image


def append_metrics(path: Path, record: dict) -> None:
    """Append one line to metrics.jsonl. It is written in one call, so a reader sees a complete line or none."""
    with explain_full_disk(path.parent, "--output-dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def save_grid(run: Run, name: str, grid: Image.Image) -> None:
    """Save a grid of images of the current epoch in the folder `name` of the run, and send it to the trackers."""
    save_image(grid, run.args.run_dir / name / f"epoch_{run.epoch:04d}.png")
    log_image(run.accelerator, name, grid, run.state.step)


def progress_bar(run: Run) -> tqdm:
    """Return a progress bar with photos per second and the time left.

    If stderr is not a terminal, it prints a line every 30 seconds.
    """
    return tqdm(
        total=run.length.steps and run.length.steps * run.plan.global_batch,
        initial=run.state.step * run.plan.global_batch,
        unit=" photos",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
        disable=not run.accelerator.is_main_process,
    )


def show_progress(run: Run) -> None:
    """Move the bar by one step. The first three steps and every tenth step also update the losses shown in it."""
    if run.state.step % 10 == 0 or run.state.step <= 3:
        run.bar.total = run.total_steps * run.plan.global_batch
        losses = run.means.means()
        run.bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()}, refresh=False)
    run.bar.update(run.plan.global_batch)


def log_validation(run: Run, values: dict[str, float], is_printed: bool, not_printed: Sequence[str] = ()) -> None:
    """Add the values of a validation to the history, to metrics.jsonl and to the trackers. Print them if `is_printed`.

    Args:
        not_printed: names of values that are left out of the printed line. Their measurement differs from that of the
            values beside them, so a comparison would mislead.
    """
    progress = {
        "step": run.state.step,
        "epoch": run.epoch,
        "images_seen": run.state.step * run.plan.global_batch,
        "seconds": round(run.state.seconds, 3),
    }
    run.history.append(progress | {name: float(f"{value:.6g}") for name, value in values.items()})
    run.accelerator.log(values, step=run.state.step)
    if run.accelerator.is_main_process:
        append_metrics(run.args.run_dir / "metrics.jsonl", run.history[-1])
        if is_printed:
            # names with a number at the end are bands of timesteps, which only the plot shows
            printed = {
                name: value
                for name, value in values.items()
                if not re.search(r"(loss|gauge)_\d$", name) and name not in (*not_printed, "published")
            }
            run.bar.write(
                f"epoch {run.epoch}: "
                + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in printed.items())
                + (", saved as best" if values.get("published") else "")
            )
