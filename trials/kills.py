"""kill -9 at random moments and at each kind of file operation. The run is resumed until it is done.

Right: the finished run has the same weights and metrics, bit for bit, as a run that was never interrupted.
"""

import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

from common import WORK, Base, Program, Trial, fresh_folder, rng_of, run, same_run

KINDS = {
    "VAE with accumulation": ("train_vae", ["--grad-accum", 2]),
    "VAE with plateau and discriminator": (
        "train_vae",
        ["--lr-scheduler", "plateau", "--adversarial-weight", 0.3, "--adversarial-start", 0.3],
    ),
    "UNet with accumulation": ("train_unet", ["--grad-accum", 2]),
    "UNet without EMA, with Muon": ("train_unet", ["--no-ema", "--optimizer", "muon"]),
}
OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"}


def kill_at_operation(number: int, counter: str) -> None:
    """Kill this process at its file operation `number` below WORK. With 0, write the number of operations instead."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in OPERATIONS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path, writes = os.fsdecode(arguments[0]), event != "open" or set(str(arguments[1])) & set("wax+")
        if writes and "/trials/" in os.path.abspath(path):
            count += 1
            if number:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.write(descriptor, b".")

    descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if counter else -1
    sys.addaudithook(hook)


def references(base: Base) -> dict[str, tuple[Path, float, int]]:
    """Return for each kind the uninterrupted run, its seconds, and the number of its file operations."""
    found = {}
    for kind, (script, flags) in KINDS.items():
        folder, counter = fresh_folder(f"reference {kind}"), WORK / "operations"
        counter.unlink(missing_ok=True)
        start = time.monotonic()
        words = getattr(base, script)(folder / "run", *flags)
        done = run(*words, folder=folder, before=("kills", "kill_at_operation", 0, str(counter)))
        assert done.code == 0, done.output
        found[kind] = folder / "run", time.monotonic() - start, counter.stat().st_size
    return found


def trial(base: Base, reference: tuple, kind: str, seed: int, number: int) -> str:
    """Kill a run up to three times, resume it, and compare it with the reference."""
    rng, folder = rng_of(seed, kind, number), fresh_folder(f"kill {number} {kind}")
    uninterrupted, seconds, operations = reference
    script, flags = KINDS[kind]
    words = [*getattr(base, script)(folder / "run", *flags), "--resume", "latest"]
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            before = ("kills", "kill_at_operation", rng.randint(1, operations), "")
            done = Program(words, folder, before=before).start().wait()
        else:
            program = Program(words, folder).start()
            program.process.join(rng.uniform(0.05, seconds))
            if program.process.is_alive():
                program.process.kill()
            done = program.wait()
        if done.code not in (0, -signal.SIGKILL):
            return f"exit code {done.code} instead of a kill: {done.last_line}"
        if done.code == 0:
            break
    else:
        done = run(*words, folder=folder)
    if done.code:
        return f"the resumed run ended with {done.code}: {done.last_line}"
    wrong = same_run(uninterrupted, folder / "run")
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def trials(base: Base, seed: int, count: int = 200) -> list[Trial]:
    found = references(base)
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(count)]
    return [
        Trial(f"{kind}, {number}", partial(trial, base, found[kind], kind, seed, number))
        for number, kind in enumerate(kinds)
    ]
