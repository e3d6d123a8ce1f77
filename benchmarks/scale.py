"""Do a step and the memory of a run stay what they are when the photos become a million?

python benchmarks/scale.py --photos 300 1000000

Makes up latents of so many photos (the posterior of a photo and its mirror image) and the features that a UNet is aligned with, writes
them to a cache of its own as encoding would, and runs UNet steps on them, each count in a process of its own, read as train_unet.py reads
them: few from memory, many from the disk. A million of 4x8x8, with features of 112x4x4, take 18 GB of disk while it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine

FEATURES = 112  # of EfficientNet-Lite0 at 1/16, as alignment.py has them


def measure(count: int, steps: int, batch_size: int, side: int) -> dict[str, float]:
    """The median step's milliseconds, and the process's memory at the end, in MB."""
    import torch

    from corel_diffusers.batches import CPU, BatchPlan, StepRandom, batches, resident
    from corel_diffusers.data.cache import Shards, cached_array
    from corel_diffusers.data.views import pick_versions
    from corel_diffusers.latents import draw
    from corel_diffusers.losses import denoising_loss
    from corel_diffusers.models import build_unet, build_vae

    random = np.random.default_rng(0)

    def made_up(*shape: int) -> Shards:
        pattern = random.normal(size=(257, *shape)).astype(np.float32)
        make = lambda photos: pattern[np.arange(photos.start, photos.stop) % 257]  # noqa: E731
        return cached_array(f"made-up-{count}-{shape[1]}", (count, *shape), np.float32, make, "writing", at_once=4096)

    moments, features = made_up(2, 8, side, side), made_up(2, FEATURES, side // 2, side // 2)
    torch.manual_seed(0)
    unet = build_unet("tiny", (4 * side, 4 * side), build_vae("tiny", (4 * side, 4 * side)), None)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    plan = BatchPlan(count, batch_size, 1, 1, 0, seed=0)
    versions = lambda step: pick_versions(step, 0, batch_size, 0, 0.0)  # noqa: E731
    times = [time.monotonic()]
    for step, (values, _) in enumerate(batches(plan, 0, steps, 0, *resident([moments, features], CPU), versions=versions)):
        draws = StepRandom(0, step, batch_size, slice(0, batch_size))
        latents = draw(values, draws.normal(4, side, side))
        denoising_loss(unet(latents, draws.integers(1000)).sample, latents).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic())
    return {"ms": 1e3 * float(np.median(np.diff(times)[10:])), "mb": resident_mb()}


def resident_mb() -> float:
    """What the process holds in memory, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[300, 1_000_000])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=8, help="of the latents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(measure(args.count, args.steps, args.batch_size, args.side)))
        return
    found = {count: [] for count in args.photos}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats + 1):  # the first writes the cache
            for count in args.photos:
                flags = ["--count", count, "--steps", args.steps, "--batch-size", args.batch_size, "--side", args.side]
                done = subprocess.run(
                    [sys.executable, __file__, *map(str, flags)],
                    env=os.environ | {"HF_HOME": folder}, check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                if repeat:
                    found[count].append(json.loads(done.stdout.splitlines()[-1]))
    few, many = args.photos[0], args.photos[-1]
    of = {count: {name: np.median([run[name] for run in runs]) for name in ("ms", "mb")} for count, runs in found.items()}
    cells = "; ".join(f"{count:,} photos {of[count]['ms']:.3g} ms, {of[count]['mb']:,.0f} MB" for count in args.photos)
    print(json.dumps({"question": "scale", "runs": found}))
    print(machine("cpu"))
    print(f"| UNet step, {few:,} photos against {many:,} | {cells} | {of[many]['ms'] / of[few]['ms']:.2f} times as slow |")


if __name__ == "__main__":
    main()
