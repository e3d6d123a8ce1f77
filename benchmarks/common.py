"""Code that the benchmarks share: run the project's scripts, time steps, compare times and name the machine."""

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
# No samples and no checkpoints during training, so that they take no time
QUIET = ["--sample-every", 10**6, "--checkpoint-every", 10**6]


def run_script(*arguments: object) -> float:
    """Run a script of the project and return the seconds that it took."""
    start = time.monotonic()
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)
    return time.monotonic() - start


def run_command(*arguments: object) -> float:
    """Run `corel-diffusers` with these arguments and return the seconds that it took."""
    return run_script("-c", "from corel_diffusers.cli import main; main()", *arguments)


def evaluate(data_dir: Path, output_dir: Path, num_images: int, against: str, *flags: object) -> dict:
    """Run `corel-diffusers evaluate` and return its results. With --pictures, `num_images` has no meaning."""
    shared = ["--data-dir", data_dir, "--output-dir", output_dir, "--against", against]
    run_command("evaluate", *shared, *flags, *([] if "--pictures" in flags else ["--num-images", num_images]))
    return json.loads((output_dir / "evaluation.json").read_text())


def make_photos(folder: Path, count: int = 64) -> Path:
    """Save drawn scenes of the size of Corel photos as PNG files and return the folder."""
    from corel_diffusers.data.scenes import CLASS_NAMES, draw_scene

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = draw_scene(index % len(CLASS_NAMES), np.random.default_rng(index))
        scene.resize((384, 256), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png")
    return folder


def record_steps(times_file: Path, script: str, flags: list[str], clock: Callable[[], object] = time.monotonic) -> None:
    """Run a training script in this process. Write the clock's value at the end of each step to a JSON file.

    The time between two values covers everything in the training loop.
    """
    from corel_diffusers.files import write_json
    from corel_diffusers.training import metrics

    step_ends, original_show_progress = [], metrics.show_progress

    def show_progress(*values: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        step_ends.append(clock())
        original_show_progress(*values)

    metrics.show_progress = show_progress  # the script calls it through the module
    sys.path.insert(0, str(ROOT))  # a script that is started directly finds its own folder there
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    write_json(times_file, step_ends)


def step_seconds(*arguments: object, warmup: int = 10) -> list[float]:
    """Run a training script or benchmarks/plain.py and return the seconds of each step after the warm-up steps."""
    with tempfile.TemporaryDirectory() as folder:
        times_file = Path(folder) / "times.json"
        if Path(str(arguments[0])).name == "plain.py":
            run_script(*arguments[:3], times_file, *arguments[3:])
        else:
            run_script(ROOT / "benchmarks" / "common.py", times_file, *arguments, "--output-dir", Path(folder) / "run")
        return np.diff(json.loads(times_file.read_text()))[warmup:].tolist()


def step_arguments(description: str, batch_size: int, steps: int) -> argparse.Namespace:
    """Parse the flags of the benchmarks that time a training step."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--config", default="tiny", help="tiny, base or large")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument(
        "--steps", type=int, default=steps, help="timed steps; at least as many warm-up steps come first"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run the toolkit's scripts with --compile; the time to compile is not counted",
    )
    args = parser.parse_args()
    args.warmup = max(args.steps, 20 if args.compile else 0)  # --compile starts with 13 uncompiled steps
    args.compiled = ["--compile"] if args.compile else []
    return args


def compare(question: str, sides: dict[str, Callable[[], list[float]]], repeats: int, unit: str = "ms per step") -> str:
    """Measure each side in turn, `repeats` times, and compare every other side with the last one.

    Return one row of the table per other side: medians, ranges, and how many times as fast the last side is.

    Args:
        sides: name -> a function that measures this side once and returns seconds.
    """
    measured_ms = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            measured_ms[name].append(1e3 * float(np.median(measure())))
    cells = {
        name: f"{name} {np.median(ms):,.3g} ({min(ms):,.3g} to {max(ms):,.3g})" for name, ms in measured_ms.items()
    }
    *other_sides, last_side = measured_ms
    ratios = {side: float(np.median(measured_ms[side]) / np.median(measured_ms[last_side])) for side in other_sides}
    print(json.dumps({"question": question, "unit": unit, "ratios": ratios} | measured_ms))
    return "\n".join(
        f"| {question} | {cells[side]}; {cells[last_side]} {unit} | {ratios[side]:.2f} |" for side in other_sides
    )


def machine_name(device: str = "auto") -> str:
    """Return a description of the machine for the tables.

    It names the GPU if there is one and `device` is not "cpu". Otherwise it names the CPU.
    """
    from corel_diffusers.internals import has_bf16_in_hardware

    cpuinfo = Path("/proc/cpuinfo")
    cpu_model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = (
        torch.cuda.get_device_name()
        if device != "cpu" and torch.cuda.is_available()
        else cpu_model[1]
        if cpu_model
        else platform.processor()
    )
    bf16 = " with bf16" if has_bf16_in_hardware() else ""
    return (
        f"{name}, {torch.backends.cpu.get_cpu_capability()}{bf16}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=record_steps.__doc__)
    parser.add_argument("times", type=Path)
    parser.add_argument("script")
    given, rest = parser.parse_known_args()
    record_steps(given.times, given.script, rest)
