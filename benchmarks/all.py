"""Every speed benchmark at a size that takes a quarter of an hour on two cores: what `make bench` runs.

python benchmarks/all.py --output-dir benchmarks/results

Leaves `<machine>.md`. Nothing else should be running. The sampler's table is of a model that is trained here for two minutes on drawn
scenes: its seconds can be relied on, its distances only say that faster samplers are not worse.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, launch, machine

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


def lines_of(script: str, flags: list) -> list[str]:
    """The lines of a benchmark's table."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, flags)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return [line for line in done.stdout.splitlines() if line.startswith("|")]


def sampling() -> str:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # a cache of its own
        shared = ["--data-dir", "scenes", "--config", "tiny", "--image-size", 64, "--max-train-minutes", 1]
        launch(ROOT / "train_vae.py", *shared, "--output-dir", f"{folder}/vae")
        launch(ROOT / "train_unet.py", *shared, "--vae-checkpoint", f"{folder}/vae", "--output-dir", f"{folder}/pipeline")
        flags = ["--pipeline", f"{folder}/pipeline", "--data-dir", "scenes", "--output-dir", f"{folder}/sampling"]
        launch(HERE / "sampling.py", *flags, *SAMPLING)
        return (Path(folder) / "sampling" / "sampling.md").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE / "results")
    args = parser.parse_args()
    began = time.monotonic()
    parts = [f"# Speed\n\n{machine()}. Medians and ranges; a ratio: how many times as fast the last is."]
    for title, runs in RUNS.items():
        lines = [line for script, flags in runs for line in lines_of(script, flags)]
        parts.append("\n".join([f"## {title}\n", "| what | measured | ratio |", "|---|---|---|", *lines]))
    parts.append(f"## Sampling\n\n{sampling()}")
    name = re.sub(r"[^a-z0-9]+", "-", machine().rsplit(", ", 2)[0].lower()).strip("-")
    write_text(args.output_dir / f"{name}.md", "\n\n".join(parts))
    print(f"{args.output_dir / name}.md, after {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
