"""Each stop signal, at random moments of each command: once, twice, to the group, with workers, to two processes.

Right: exit code 128 + the signal's number (or the command had just ended), no traceback, and a resumed training run is
that of a run without an interruption. Also: one of two processes is killed; the other one ends with a reason.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
from common import ROOT, WORK, Base, Program, Trial, fresh_folder, rng_of, run, same_run, start_two

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
WAYS = ("once", "twice", "to the group", "with a worker", "to two processes")


def commands(base: Base, folder: Path) -> dict[str, list[object]]:
    """Return the words of each command that is interrupted. Photos of its own: nothing is cached yet."""
    pipeline = folder / "pipeline"
    if not pipeline.exists():  # tune-decoder changes it
        shutil.copytree(base.unet, pipeline)
    return {
        "train_vae": base.train_vae(folder / "run"),
        "train_unet": base.train_unet(folder / "run"),
        "prepare": ["prepare", "--data-dir", base.photos, "--output-dir", "prepared", "--figs-dir", "figs"],
        "generate": [
            "generate",
            "--pipeline",
            base.unet,
            "--num-images",
            40,
            "--batch-size",
            2,
            "--output",
            "grid.png",
        ],
        "evaluate": [
            "evaluate",
            "--pipeline",
            base.unet,
            "--data-dir",
            base.photos,
            "--num-images",
            40,
            "--against",
            "all",
            "--output-dir",
            folder / "evaluation",
        ],
        "tune-decoder": ["tune-decoder", "--pipeline", pipeline, "--data-dir", base.photos, "--minutes", 0.2],
        "push": ["push", "--pipeline", base.unet, "--repo-id", "user/name", "--dry-run"],
    }


def start(words: list[object], folder: Path, is_pair: bool) -> list[Program]:
    """Start a program, or two processes that train together."""
    if is_pair:
        return start_two(words, folder, cache=folder / "cache")
    return [Program(words, folder, cache=folder / "cache", new_group=True).start()]


def trial(
    base: Base, references: dict, command: str, seconds: float, number: int, way: str, seed: int, index: int
) -> str:
    folder, rng = fresh_folder(f"signal {index}"), rng_of(seed, "signals", index)
    words = commands(base, folder)[command]
    is_training = command.startswith("train")
    is_pair = way == "to two processes" and is_training
    if is_pair:
        words += ["--batch-size", 2]
    if way == "with a worker" and is_training:
        words += ["--num-workers", 1]
    programs = start(words, folder, is_pair)
    for program in programs:
        while not program.log.read_text() and program.process.is_alive():  # its first line: it handles signals by then
            time.sleep(0.01)
    programs[0].process.join(rng.uniform(0, seconds))
    for program in programs:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if way in ("to the group", "with a worker") else os.kill)(program.process.pid, number)
            if way == "twice":
                time.sleep(0.02)
                os.kill(program.process.pid, number)
    for done in [program.wait() for program in programs]:
        # a second signal can come when the program has given its handlers back
        if done.has_traceback or done.code not in (0, 128 + number, *([-number] if way == "twice" else [])):
            return f"exit code {done.code}: {done.last_line}"
    if is_training:
        for resumed in [program.wait() for program in start([*words, "--resume", "latest"], folder, is_pair)]:
            if resumed.code and "a finished run" not in resumed.output:
                return f"the resumed run ended with {resumed.code}: {resumed.last_line}"
        wrong = same_run(references[command, is_pair], folder / "run")
    else:
        again = run(*words, folder=folder, cache=folder / "cache")
        wrong = "" if again.code == 0 else f"again: exit code {again.code}: {again.last_line}"
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def one_of_two(base: Base, victim: int, index: int) -> str:
    """Kill one of two processes of `torchrun`: the other one must end."""
    folder = fresh_folder(f"two processes {index}")
    words = [str(word) for word in base.train_vae(folder / "run", "--epochs", 60, "--batch-size", 2)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += [str(ROOT / words[0]), *words[1:]]
    log = (WORK / f"two-{index}.log").open("w")
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(launch, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=env)
    metrics, end = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.2)
    ranks = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a process that has ended by now
            ranks += [child] if any("train_vae.py" in word for word in child.cmdline()) else []
    if len(ranks) != 2:
        process.kill()
        return f"{len(ranks)} processes instead of 2"
    start = time.monotonic()
    ranks[victim].kill()
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        return "the other process did not end within a minute"
    if any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        return f"a process is left after {time.monotonic() - start:.0f} seconds"
    return "" if code else "exit code 0"


def trials(base: Base, seed: int, count: int = 140) -> list[Trial]:
    seconds, references = {}, {("train_vae", False): base.vae, ("train_unet", False): base.unet}
    for command in commands(base, WORK):
        folder = fresh_folder(f"reference {command}")
        begin = time.monotonic()
        done = run(*commands(base, folder)[command], folder=folder, cache=folder / "cache")
        assert done.code == 0, done.output
        seconds[command] = time.monotonic() - begin
    for command in ("train_vae", "train_unet"):
        folder = fresh_folder(f"two processes of {command}")
        words = [*commands(base, folder)[command], "--batch-size", 2]
        assert not any(program.wait().code for program in start(words, folder, is_pair=True))
        references[command, True] = folder / "run"
    found = []
    for index in range(count):
        command = list(seconds)[index % len(seconds)]
        number = SIGNALS[index // len(seconds) % len(SIGNALS)]
        way = WAYS[index // len(seconds) // len(SIGNALS) % len(WAYS)]
        run_it = partial(trial, base, references, command, seconds[command], number, way, seed, index)
        found.append(Trial(f"{command}, {number.name} {way}, {index}", run_it))
    found += [Trial(f"one of two processes, rank {n % 2}, {n}", partial(one_of_two, base, n % 2, n)) for n in range(4)]
    return found
