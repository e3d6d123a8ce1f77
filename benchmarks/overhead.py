"""How much of a training step is spent outside the forward pass, the backward pass and the optimizer?

python benchmarks/overhead.py --image-size 64 --config tiny

Runs the training scripts themselves and times these three parts. The losses count as a part of the forward pass. The
remaining time is for reading batches, drawing random numbers, clipping, averaging, and the rest: adding noise,
augmenting, logging. The benchmark runs on the CPU, where no work runs asynchronously. Run nothing else at the same
time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path

import numpy as np
from common import QUIET, ROOT, machine_name, make_photos, record_steps

OUTSIDE = ("batches", "randomness", "clipping", "averaging")


def record(times_file: Path, script: str, flags: list[str]) -> None:
    """Run a training script in this process and write its times at the end of each step to a JSON file.

    Each record holds the clock, the seconds so far in forward, backward and optimizer, and the seconds so far in each
    of OUTSIDE.
    """
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from corel_diffusers.data.batches import ArrayBatches
    from corel_diffusers.losses import alignment, diffusion
    from corel_diffusers.losses import vae as vae_losses
    from corel_diffusers.losses.perceptual import PerceptualLoss
    from corel_diffusers.models.unet import UNetForTraining
    from corel_diffusers.models.vae import VAEWithPosterior
    from corel_diffusers.runtime.randomness import StepRandom
    from corel_diffusers.training import ema, optimizers

    seconds = dict.fromkeys(("inside", *OUTSIDE), 0.0)

    def add_timer(category: str, owner: object, name: str) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def timed(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                seconds[category] += time.perf_counter() - start

        setattr(owner, name, timed)

    for owner in (UNetForTraining, VAEWithPosterior, PerceptualLoss):
        add_timer("inside", owner, "forward")
    for name in ("prediction_target", "denoising_loss", "min_snr_weight"):
        add_timer("inside", diffusion, name)
    for name in ("reconstruction_loss", "kl_divergence"):
        add_timer("inside", vae_losses, name)
    add_timer("inside", alignment, "alignment_loss")
    add_timer("inside", Accelerator, "backward")
    for name in ("step", "zero_grad"):
        add_timer("inside", AcceleratedOptimizer, name)
    add_timer("batches", ArrayBatches, "__getitem__")
    for name in ("__init__", "normal", "integers", "uniform"):
        add_timer("randomness", StepRandom, name)
    add_timer("clipping", optimizers, "clip_gradients")
    add_timer("averaging", ema.EMA, "step")
    record_steps(times_file, script, flags, lambda: (time.perf_counter(), *seconds.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="tiny, base or large")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, default=100, help="timed steps; the same number of warm-up steps comes first"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "CUDA_VISIBLE_DEVICES": ""}  # a temporary cache
        photos, vae = make_photos(Path(folder) / "photos"), Path(folder) / "vae"
        shared = [
            "--data-dir",
            photos,
            "--config",
            args.config,
            "--max-train-steps",
            2 * args.steps,
            "--validate-every",
            10**6,
            *QUIET,
        ]
        for name, script_flags in (
            ("train_vae.py", ["--image-size", args.image_size]),
            ("train_unet.py", ["--vae-checkpoint", vae]),
        ):
            percentages = []  # (repeats, 1 + parts), in % of a step: the total outside, then each part
            for repeat in range(args.repeats):
                output_dir = vae if name == "train_vae.py" and not repeat else Path(folder) / f"{name}-{repeat}"
                times_file = Path(folder) / "times.json"
                command = [
                    sys.executable,
                    __file__,
                    "--record",
                    times_file,
                    ROOT / name,
                    *shared,
                    *script_flags,
                    "--output-dir",
                    output_dir,
                ]
                subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                step, inside, *parts = np.diff(json.loads(times_file.read_text()), axis=0)[args.steps :].T
                percentages.append([100 * float(np.median(part / step)) for part in (step - inside, *parts)])
            question = f"outside forward, backward and optimizer, {name}, {args.config}, {args.image_size} px"
            print(json.dumps({"question": question, "unit": "% of a step", "found": percentages}))
            outside, *parts = np.median(percentages, axis=0)
            value_range = f"{min(percentages)[0]:.1f} to {max(percentages)[0]:.1f} % of a step"
            named_parts = ", ".join(f"{part} {percentage:.1f}" for part, percentage in zip(OUTSIDE, parts, strict=True))
            lines.append(
                f"| {question} | {value_range}: {named_parts}, the rest {outside - sum(parts):.1f} | {outside:.1f} % |"
            )
    print(machine_name("cpu"), *lines, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:  # each run of a script has its own process
        times, script, *flags = sys.argv[2:]
        record(Path(times), script, flags)
    else:
        main()
