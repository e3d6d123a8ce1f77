"""A long run with frequent checkpoints. Right: from step 1,000 on, its memory grows by less than 1 %."""

import json
import os
from functools import partial
from pathlib import Path

from common import Base, Program, Trial, fresh_folder


def record_memory(file: str) -> None:
    """Write the resident memory and the number of open files every 100 steps."""
    import psutil

    from corel_diffusers.training import metrics

    original, process = metrics.show_progress, psutil.Process(os.getpid())

    def show_progress(run: object) -> None:
        original(run)
        if run.state.step % 100 == 0:
            with Path(file).open("a") as opened:
                record = {"step": run.state.step, "bytes": process.memory_info().rss, "files": process.num_fds()}
                opened.write(json.dumps(record) + "\n")

    metrics.show_progress = show_progress


def trial(base: Base, script: str, steps: int) -> str:
    folder = fresh_folder(f"soak {script}")
    words = getattr(base, script)(
        folder / "run",
        "--max-train-steps",
        steps,
        "--checkpoint-every",
        20,
        "--validate-every",
        20,
        "--sample-every",
        200,
    )
    record = folder / "memory.jsonl"
    done = Program(words, folder, before=("soak", "record_memory", str(record))).start().wait(3600)
    if done.code:
        return f"exit code {done.code}: {done.last_line}"
    records = [json.loads(line) for line in record.read_text().splitlines()]
    late = [r for r in records if r["step"] >= min(1000, steps // 10)]
    # the peaks of a tenth of the run: the memory of a moment depends on what runs in it
    tenth = max(1, len(late) // 10)
    first, last = (max(r["bytes"] for r in part) for part in (late[:tenth], late[-tenth:]))
    print(f"{script}: {first / 2**20:.1f} MiB, later {last / 2**20:.1f} MiB")
    if late[-1]["files"] > late[0]["files"]:
        return f"{late[-1]['files'] - late[0]['files']} more open files"
    return "" if last < 1.01 * first else f"the memory grew by {last / first - 1:.1%}"


def trials(base: Base, seed: int, count: int = 10_000) -> list[Trial]:
    return [
        Trial(f"{script}, {count} steps", partial(trial, base, script, count)) for script in ("train_vae", "train_unet")
    ]
