"""Run every speed benchmark at a size that takes a quarter of an hour on two cores. `make bench` runs this script.

python benchmarks/all.py --output-dir benchmarks/results

Writes `<machine>.md`. Run nothing else at the same time. The table of samplers uses a model that this script trains for
two minutes on drawn scenes. The seconds in that table are reliable. Its distances only show that faster samplers are
not worse.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine_name, run_script

from corel_diffusers.files import write_text

HERE = Path(__file__).parent
RUNS = {
    "A training step": [
        ("vae_step.py", ["--repeats", 2, "--steps", 10]),
        ("unet_step.py", ["--repeats", 2, "--steps", 10]),
        ("overhead.py", ["--repeats", 1]),
        ("peak.py", []),
    ],
    "Photos": [("data.py", []), ("scale.py", ["--repeats", 2, "--steps", 100, "--photos", 300, 100_000])],
    "Starting": [("startup.py", [])],
}
SAMPLING = ["--num-images", 64, "--batch-size", 32, "--steps", 10, 25, 50, "--samplers", "dpm-solver++", "ddim"]


def table_rows(script: str, flags: list) -> list[str]:
    """Run a benchmark and return the rows of its table: the lines of its output that start with "|"."""
    process = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, flags)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    print(process.stdout, flush=True)
    return [line for line in process.stdout.splitlines() if line.startswith("|")]


def sampling() -> str:
    """Train a small model, time the samplers on it and return their table."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # a temporary cache
        shared = ["--data-dir", "scenes", "--config", "tiny", "--image-size", 64, "--max-train-minutes", 1]
        run_script(ROOT / "train_vae.py", *shared, "--output-dir", f"{folder}/vae")
        run_script(
            ROOT / "train_unet.py",
            *shared,
            "--vae-checkpoint",
            f"{folder}/vae",
            "--output-dir",
            f"{folder}/pipeline",
        )
        flags = ["--pipeline", f"{folder}/pipeline", "--data-dir", "scenes", "--output-dir", f"{folder}/sampling"]
        run_script(HERE / "sampling.py", *flags, *SAMPLING)
        return (Path(folder) / "sampling" / "sampling.md").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE / "results")
    args = parser.parse_args()
    start = time.monotonic()
    sections = [
        f"# Speed\n\n{machine_name()}. Medians and ranges. "
        "The ratio says how many times as fast the last entry of its row is."
    ]
    for title, benchmarks in RUNS.items():
        rows = [line for script, flags in benchmarks for line in table_rows(script, flags)]
        sections.append("\n".join([f"## {title}\n", "| what | measured | ratio |", "|---|---|---|", *rows]))
    sections.append(f"## Sampling\n\n{sampling()}")
    name = re.sub(r"[^a-z0-9]+", "-", machine_name().rsplit(", ", 2)[0].lower()).strip("-")
    write_text(args.output_dir / f"{name}.md", "\n\n".join(sections))
    print(f"{args.output_dir / name}.md: done after {(time.monotonic() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
