"""kill -9 at random moments and at each kind of file operation. The run is resumed until it is done.

Right: the finished run has the same weights and metrics, bit for bit, as a run that was never interrupted.
"""

import os
import shutil
import signal
import sys
import time
from functools import partial
from multiprocessing import connection
from pathlib import Path
from random import Random
from typing import NamedTuple

from common import HANGS, WORK, Base, Program, Trial, fresh_folder, rng_of, same_run, start_two

from corel_diffusers.training import guide


class Kind(NamedTuple):
    """A training run that is killed."""

    script: str
    flags: list[object]
    processes: int = 1
    guide_from: int = 0  # images after which the guide model is used; 0: as in the toolkit


KINDS = {
    "VAE with accumulation": Kind("train_vae", ["--grad-accum", 2]),
    "VAE with plateau and discriminator": Kind(
        "train_vae", ["--lr-scheduler", "plateau", "--adversarial-weight", 0.3, "--adversarial-start", 0.3]
    ),
    "VAE of two processes": Kind("train_vae", ["--batch-size", 2], processes=2),
    "UNet with accumulation": Kind("train_unet", ["--grad-accum", 2]),
    "UNet without EMA, with Muon": Kind("train_unet", ["--no-ema", "--optimizer", "muon"]),
    "UNet with a guide model": Kind("train_unet", [], guide_from=12),
    "UNet of two processes": Kind("train_unet", ["--batch-size", 2], processes=2),
}
OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"}


def kill_at_operation(number: int, counter: str, guide_from: int) -> None:
    """Kill this process at its file operation `number` below WORK. With 0, none is killed.

    Args:
        counter: a file that becomes as many bytes longer as there are operations. "" counts nothing.
    """
    if guide_from:
        guide.GUIDE_FROM_IMAGES = guide_from
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in OPERATIONS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path, writes = os.fsdecode(arguments[0]), event != "open" or set(str(arguments[1])) & set("wax+")
        if writes and "/trials/" in os.path.abspath(path):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if counter:
                os.write(descriptor, b".")

    descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if counter else -1
    sys.addaudithook(hook)


def start(kind: Kind, words: list[object], folder: Path, number: int = 0, counter: str = "") -> list[Program]:
    """Start the processes of a run."""
    before = ("kills", "kill_at_operation", number, counter, kind.guide_from)
    if kind.processes == 2:
        return start_two(words, folder, before=before)
    return [Program(words, folder, before=before).start()]


def references(base: Base) -> dict[str, tuple[Path, float, int]]:
    """Return for each kind the uninterrupted run, its seconds, and the number of its file operations."""
    found = {}
    for name, kind in KINDS.items():
        folder, counter = fresh_folder(f"reference {name}"), WORK / "operations"
        counter.unlink(missing_ok=True)
        begin = time.monotonic()
        words = getattr(base, kind.script)(folder / "run", *kind.flags)
        for done in [program.wait() for program in start(kind, words, folder, counter=str(counter))]:
            assert done.code == 0, done.output
        found[name] = folder / "run", time.monotonic() - begin, counter.stat().st_size
    assert (found["UNet with a guide model"][0] / "guide").is_dir()
    return found


def kill_once(kind: Kind, words: list[object], folder: Path, seconds: float, operations: int, rng: Random) -> str:
    """Start a run and kill it, or one of its processes. Return "" if it was killed, "done", or what is wrong."""
    if rng.random() < 0.5:
        programs = start(kind, words, folder, rng.randint(1, operations))
    else:
        programs = start(kind, words, folder)
        programs[0].process.join(rng.uniform(0.05, seconds))
        for program in rng.sample(programs, rng.randint(1, len(programs))):
            if program.process.is_alive():
                program.process.kill()
    connection.wait([program.process.sentinel for program in programs], timeout=180)
    # the other process ends soon, or it waits for one that has not started: a launcher kills it then
    results = [program.wait(10) for program in programs]
    killed = -signal.SIGKILL in {done.code for done in results}
    for done in results:
        is_told = killed and (done.code == HANGS or "another process of this run" in done.last_line)
        if done.has_traceback or not (done.code in (0, -signal.SIGKILL) or is_told):
            return f"exit code {done.code} instead of a kill: {done.last_line}"
    return "" if killed else "done"


def trial(base: Base, reference: tuple, name: str, seed: int, number: int) -> str:
    """Kill a run up to three times, resume it, and compare it with the reference."""
    rng, folder, kind = rng_of(seed, name, number), fresh_folder(f"kill {number} {name}"), KINDS[name]
    uninterrupted, seconds, operations = reference
    words = [*getattr(base, kind.script)(folder / "run", *kind.flags), "--resume", "latest"]
    for _ in range(rng.randint(1, 3)):
        if ended := kill_once(kind, words, folder, seconds, operations, rng):
            break
    if ended not in ("", "done"):
        return ended
    for done in [] if ended else [program.wait() for program in start(kind, words, folder)]:
        if done.code:
            return f"the resumed run ended with {done.code}: {done.last_line}"
    wrong = same_run(uninterrupted, folder / "run")
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def trials(base: Base, seed: int, count: int = 200) -> list[Trial]:
    found = references(base)
    names = [list(KINDS)[number % len(KINDS)] for number in range(count)]
    return [
        Trial(f"{name}, {number}", partial(trial, base, found[name], name, seed, number))
        for number, name in enumerate(names)
    ]
