"""What the trials share: small models to train, and programs that start fast, so that thousands of them can be tried.

A program runs in a process of its own. It is forked from a server process that has imported torch, diffusers and the
toolkit, and it runs the same `main` as the script or the command.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WORK = Path(os.environ.get("COREL_TRIALS") or tempfile.mkdtemp(prefix="corel-trials-"))
os.environ |= {
    "COREL_TRIALS": str(WORK),
    "HF_HOME": str(WORK / "hf"),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
os.environ |= {"MPLCONFIGDIR": str(WORK / "mpl"), "TOKENIZERS_PARALLELISM": "false"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])
EPOCHS = 3
HANGS = -999  # the exit code of a program that did not end
VAE_FLAGS = ["--image-size", "32", "--batch-size", "4", "--mixed-precision", "no", "--attention", "fused"]
UNET_FLAGS = ["--batch-size", "4", "--mixed-precision", "no", "--attention", "fused", "--views", "1"]


class Trial(NamedTuple):
    """A thing to try: `run` returns "" if all is right, or else what is wrong."""

    name: str
    run: Callable[[], str]


@dataclass
class Result:
    """How a program ended."""

    code: int  # its exit code; negative: the signal that killed it
    output: str

    @property
    def last_line(self) -> str:
        return (self.output.strip().splitlines() or [""])[-1]

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output

    def refused(self) -> str:
        """Return "" if the program has ended with exit code 2 and one line, or else what is wrong."""
        if self.has_traceback:
            return f"a traceback: {self.last_line}"
        if self.code != 2:
            return f"exit code {self.code} instead of 2: {self.last_line}"
        return "" if self.last_line.startswith("error: ") else f"no error line: {self.last_line}"


@dataclass
class Program:
    """A script or a command, with the words of its command line.

    Args:
        before: a function of a module here that is called in the process first, and its arguments.
    """

    words: list[object]
    folder: Path  # the current folder of the process, and of its log
    cache: Path | None = None  # the folder of the toolkit's caches
    env: dict[str, str] = field(default_factory=dict)
    before: tuple = ()
    new_group: bool = False

    def start(self) -> "Program":
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".log", dir=WORK)
        os.close(handle)
        self.log = Path(name)
        words, cache = list(map(str, self.words)), str(self.cache or WORK / "cache")
        arguments = words, str(self.folder), cache, str(self.log), self.env, self.before, self.new_group
        from preload import run_program

        self.process = FORKS.Process(target=run_program, args=arguments)
        self.process.start()
        return self

    def wait(self, seconds: float = 180) -> Result:
        """Wait for the end of the process, and return how it ended. A process that hangs is killed: code HANGS."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return Result(HANGS, f"no end after {seconds} seconds")
        output = self.log.read_text(errors="replace")
        self.log.unlink()
        return Result(self.process.exitcode, output)


def start_two(words: list[object], folder: Path, **options: object) -> list[Program]:
    """Start two processes that train together, as `accelerate launch --num_processes 2` does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [Program(words, folder, env=shared | rank, **options).start() for rank in ranks]


def run(*words: object, folder: Path, **options: object) -> Result:
    """Run a program to its end."""
    return Program(list(words), folder, **options).start().wait()


class Base:
    """Photos, configs, a finished VAE and a finished pipeline, each with its checkpoints. Made once."""

    def __init__(self) -> None:
        from conftest import UNET_CONFIG, VAE_CONFIG, make_photos

        self.folder = WORK / "base"
        self.photos = make_photos(self.folder / "photos")
        for name, config in (("vae", VAE_CONFIG), ("unet", UNET_CONFIG)):
            (self.folder / f"{name}.json").write_text(json.dumps(config))
        self.vae, self.unet = self.folder / "vae_models", self.folder / "diffusion_models"
        for program, output in ((self.train_vae, self.vae), (self.train_unet, self.unet)):
            done = run(*program(output), folder=self.folder)
            assert done.code == 0, done.output

    def train_vae(self, output: Path, *flags: object, photos: Path | None = None) -> list[object]:
        """Return the words of a short run of train_vae.py."""
        return self._train("train_vae.py", output, VAE_FLAGS, "vae.json", flags, photos)

    def train_unet(
        self, output: Path, *flags: object, photos: Path | None = None, vae: Path | None = None
    ) -> list[object]:
        """Return the words of a short run of train_unet.py."""
        more = [*UNET_FLAGS, "--vae-checkpoint", vae or self.vae]
        return self._train("train_unet.py", output, more, "unet.json", flags, photos)

    def _train(
        self, script: str, output: Path, shared: list, config: str, flags: tuple, photos: Path | None
    ) -> list[object]:
        length = [] if "--epochs" in flags or "--max-train-steps" in flags else ["--epochs", EPOCHS]
        return [
            script,
            "--data-dir",
            photos or self.photos,
            "--config",
            self.folder / config,
            *shared,
            *length,
            "--checkpoint-every",
            1,
            "--validate-every",
            1,
            "--output-dir",
            output,
            *flags,
        ]


def fresh_folder(name: str) -> Path:
    """Return a new folder for a trial."""
    folder = WORK / "trials" / name.replace("/", "_").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def same_run(a: Path, b: Path) -> str:
    """Return "" if two finished runs have the same weights, bit for bit, and the same metrics, or else a difference."""
    newest = sorted((a / "checkpoints").iterdir())[-1]  # an interruption leaves one more, so others are removed
    published = [file for file in a.rglob("*.safetensors") if "checkpoints" not in file.parts]
    for file in sorted([*published, *newest.glob("*.safetensors")]):
        other = b / file.relative_to(a)
        if not other.is_file():
            return f"{file.relative_to(a)} is missing"
        if file.read_bytes() != other.read_bytes():
            return f"{file.relative_to(a)} differs"
    records = [
        [
            {name: value for name, value in json.loads(line).items() if name != "seconds"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (a, b)
    ]
    return "" if records[0] == records[1] else "metrics.jsonl differs"


def not_finite(folder: Path) -> str:
    """Return "" if all saved values are finite, or else the file that has another one."""
    from safetensors.torch import load_file

    for file in folder.rglob("*.safetensors"):
        if not all(value.isfinite().all() for value in load_file(file).values() if value.is_floating_point()):
            return f"{file.relative_to(folder)} has NaN or infinite values"
    metrics = folder / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        if not all(math.isfinite(value) for value in json.loads(line).values()):
            return "metrics.jsonl has NaN or infinite values"
    return ""


def rng_of(seed: int, *name: object) -> random.Random:
    """Return a random generator for one trial."""
    return random.Random(f"{seed}-{name}")
