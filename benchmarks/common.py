"""What the benchmarks share: running the project's scripts, and naming the machine."""

import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

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


def machine() -> str:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else named[1] if named else platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
