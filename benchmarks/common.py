"""What the benchmarks share: running the project's scripts, timing their steps, comparing the times, and naming the machine."""

import argparse
import json
import platform
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
QUIET = ["--sample-every", 10**6, "--checkpoint-every", 10**6]  # no time goes into pictures and checkpoints on the way


def launch(*words: object) -> float:
    """Runs a script of the project; the seconds that it took."""
    began = time.monotonic()
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)
    return time.monotonic() - began


def tool(*words: object) -> None:
    """Runs the project's command."""
    launch("-c", "from corel_diffusers.cli import main; main()", *words)


def make_photos(folder: Path, count: int = 64) -> Path:
    """Drawn scenes of the size of Corel photos, as PNG files."""
    from corel_diffusers.data.scenes import CLASS_NAMES, draw_scene

    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        scene = draw_scene(place % len(CLASS_NAMES), np.random.default_rng(place))
        scene.resize((384, 256), Image.Resampling.BICUBIC).save(folder / f"{place:04d}.png")
    return folder


def record_steps(times: Path, script: str, flags: list[str], clock: Callable[[], object] = time.monotonic) -> None:
    """Runs a training script in this process, and writes what the clock says when each step ends: everything in its loop is in that."""
    from corel_diffusers import training
    from corel_diffusers.files import write_json

    ended, shown = [], training.show_progress

    def show_progress(*values: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended.append(clock())
        shown(*values)

    training.show_progress = show_progress
    sys.path.insert(0, str(ROOT))  # as for a script that is started by itself
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    write_json(times, ended)


def step_seconds(*words: object, warmup: int = 10) -> list[float]:
    """The seconds of each step, after a warm-up, of a training script or of benchmarks/plain.py."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        if Path(str(words[0])).name == "plain.py":
            launch(*words[:3], times, *words[3:])
        else:
            launch(ROOT / "benchmarks" / "common.py", times, *words, "--output-dir", Path(folder) / "run")
        return np.diff(json.loads(times.read_text()))[warmup:].tolist()


def step_arguments(description: str, batch_size: int, steps: int) -> argparse.Namespace:
    """The flags of the benchmarks of a training step."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--config", default="tiny", help="tiny, base or large")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--steps", type=int, default=steps, help="timed, after as many for the warm-up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the scripts' side with --compile, once that is done")
    args = parser.parse_args()
    args.warmup = max(args.steps, 20 if args.compile else 0)  # --compile begins with 13 plain steps
    args.compiled = ["--compile"] if args.compile else []
    return args


def compare(question: str, sides: dict[str, Callable[[], list[float]]], repeats: int, unit: str = "ms a step") -> str:
    """Each side in turn, so many times: medians, spreads and how many times as fast the last side is, a line of the table for each other.

    sides: name -> a function that measures it once, in seconds.
    """
    found = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            found[name].append(1e3 * float(np.median(measure())))
    cells = {name: f"{name} {np.median(values):,.3g} ({min(values):,.3g} to {max(values):,.3g})" for name, values in found.items()}
    *others, last = found
    ratios = {other: float(np.median(found[other]) / np.median(found[last])) for other in others}
    print(json.dumps({"question": question, "unit": unit, "ratios": ratios} | found))
    return "\n".join(f"| {question} | {cells[other]}; {cells[last]} {unit} | {ratios[other]:.2f} |" for other in others)


def machine(device: str = "auto") -> str:
    """What the numbers were measured on: "cpu", or the GPU where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else named[1] if named else platform.processor()
    bf16 = " with bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{bf16}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=record_steps.__doc__)
    parser.add_argument("times", type=Path)
    parser.add_argument("script")
    given, rest = parser.parse_known_args()
    record_steps(given.times, given.script, rest)
