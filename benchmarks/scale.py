"""Do the time of a training step and the memory of a run stay the same with a million photos?

python benchmarks/scale.py --photos 300 1000000

For each number of photos, the script makes artificial latents (the posterior of each photo and of its mirror image) and
the artificial features that a UNet is aligned with. It writes them to a temporary cache, as encoding would. Then it
runs UNet steps on them, in a separate process for each number of photos. The steps read the data as train_unet.py reads
it: few photos from memory, many photos from disk. A million photos with latents of 4x8x8 and features of 112x4x4 take
18 GB of disk space during the run.
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
from common import machine_name

FEATURES = 112  # channels of the last features of EfficientNetLiteFeatures (models/efficientnet.py)


def measure_steps(count: int, steps: int, batch_size: int, side: int) -> dict[str, float]:
    """Run UNet steps and return their median time in milliseconds and the memory of the process at the end in MB."""
    import torch

    from corel_diffusers.data.augmented_crops import pick_versions
    from corel_diffusers.data.batches import BatchPlan, preload, training_batches
    from corel_diffusers.data.cache import ShardedArray, cached_array
    from corel_diffusers.data.latents import sample_posterior
    from corel_diffusers.losses.diffusion import denoising_loss
    from corel_diffusers.models.unet import build_unet
    from corel_diffusers.models.vae import build_vae
    from corel_diffusers.runtime.randomness import CPU, StepRandom

    rng = np.random.default_rng(0)

    def artificial_array(*shape: int) -> ShardedArray:
        pattern = rng.normal(size=(257, *shape)).astype(np.float32)
        make = lambda photos: pattern[np.arange(photos.start, photos.stop) % 257]  # noqa: E731
        return cached_array(f"made-up-{count}-{shape[1]}", (count, *shape), np.float32, make, "writing", at_once=4096)

    moments, features = artificial_array(2, 8, side, side), artificial_array(2, FEATURES, side // 2, side // 2)
    torch.manual_seed(0)
    unet = build_unet("tiny", (4 * side, 4 * side), build_vae("tiny", (4 * side, 4 * side)), None)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    plan = BatchPlan(count, batch_size, 1, 1, 0, seed=0)
    versions = lambda step: pick_versions(step, 0, batch_size, 0, 0.0)  # noqa: E731
    times = [time.monotonic()]
    for step, (values, _) in enumerate(
        training_batches(plan, 0, steps, 0, *preload([moments, features], CPU), versions=versions)
    ):
        step_rng = StepRandom(0, step, batch_size, slice(0, batch_size))
        latents = sample_posterior(values, step_rng.normal(4, side, side))
        denoising_loss(unet(latents, step_rng.integers(1000)).sample, latents).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic())
    return {"ms": 1e3 * float(np.median(np.diff(times)[10:])), "mb": resident_mb()}


def resident_mb() -> float:
    """Return the resident memory of the process in MB, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[300, 1_000_000])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=8, help="height and width of the latents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(measure_steps(args.count, args.steps, args.batch_size, args.side)))
        return
    runs_by_count = {count: [] for count in args.photos}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats + 1):  # the first run writes the cache and is not counted
            for count in args.photos:
                flags = ["--count", count, "--steps", args.steps, "--batch-size", args.batch_size, "--side", args.side]
                process = subprocess.run(
                    [sys.executable, __file__, *map(str, flags)],
                    env=os.environ | {"HF_HOME": folder}, check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                if repeat:
                    runs_by_count[count].append(json.loads(process.stdout.splitlines()[-1]))
    smallest, largest = args.photos[0], args.photos[-1]
    medians = {
        count: {name: np.median([run[name] for run in runs]) for name in ("ms", "mb")}
        for count, runs in runs_by_count.items()
    }
    cells = "; ".join(
        f"{count:,} photos {medians[count]['ms']:.3g} ms, {medians[count]['mb']:,.0f} MB" for count in args.photos
    )
    print(json.dumps({"question": "scale", "runs": runs_by_count}))
    print(machine_name("cpu"))
    print(
        f"| UNet step, {smallest:,} photos against {largest:,} | {cells} "
        f"| {medians[largest]['ms'] / medians[smallest]['ms']:.2f} times as slow |"
    )


if __name__ == "__main__":
    main()
