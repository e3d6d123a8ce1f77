"""How much of a training step goes into neither the forward pass, the backward pass nor the optimizer?

python benchmarks/overhead.py --image-size 64 --config tiny

Runs the scripts themselves with a clock around those three, the losses being a part of the forward pass; what is left is reading batches,
drawing what is random, clipping, averaging, and the rest: noising, augmenting, logging. On the CPU, where nothing runs behind the clock's
back. Nothing else should be running.
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
from common import QUIET, ROOT, machine, make_photos, record_steps

OUTSIDE = ("batches", "randomness", "clipping", "averaging")


def record(times: Path, script: str, flags: list[str]) -> None:
    """Runs a script in this process; at the end of each step, the time, how much of it went into forward, backward and optimizer, and how
    much into each of OUTSIDE."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from corel_diffusers import alignment, losses, training
    from corel_diffusers.batches import ArrayBatches, StepRandom
    from corel_diffusers.models import UNetInTraining, VAEWithPosterior
    from corel_diffusers.perceptual import PerceptualLoss

    spent = dict.fromkeys(("inside", *OUTSIDE), 0.0)

    def clocked(part: str, owner: object, name: str) -> None:
        plain = getattr(owner, name)

        @wraps(plain)
        def timed(*args: object, **options: object) -> object:
            began = time.perf_counter()
            try:
                return plain(*args, **options)
            finally:
                spent[part] += time.perf_counter() - began

        setattr(owner, name, timed)

    for owner in (UNetInTraining, VAEWithPosterior, PerceptualLoss):
        clocked("inside", owner, "forward")
    for name in ("prediction_target", "denoising_loss", "min_snr_weight", "reconstruction_loss", "kl_divergence"):
        clocked("inside", losses, name)
    clocked("inside", alignment, "misalignment")
    clocked("inside", Accelerator, "backward")
    for name in ("step", "zero_grad"):
        clocked("inside", AcceleratedOptimizer, name)
    clocked("batches", ArrayBatches, "__getitem__")
    for name in ("__init__", "normal", "integers", "uniform"):
        clocked("randomness", StepRandom, name)
    clocked("clipping", training, "clip_gradients")
    clocked("averaging", training.EMA, "step")
    record_steps(times, script, flags, lambda: (time.perf_counter(), *spent.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="tiny, base or large")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="timed, after as many for the warm-up")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "CUDA_VISIBLE_DEVICES": ""}  # a cache of its own
        photos, vae = make_photos(Path(folder) / "photos"), Path(folder) / "vae"
        shared = ["--data-dir", photos, "--config", args.config, "--max-train-steps", 2 * args.steps, "--validate-every", 10**6, *QUIET]
        for name, own in (("train_vae.py", ["--image-size", args.image_size]), ("train_unet.py", ["--vae-checkpoint", vae])):
            shares = []  # (repeats, 1 + parts): all that is outside, and each part of it, % of a step
            for repeat in range(args.repeats):
                out = vae if name == "train_vae.py" and not repeat else Path(folder) / f"{name}-{repeat}"
                times = Path(folder) / "times.json"
                words = [sys.executable, __file__, "--record", times, ROOT / name, *shared, *own, "--output-dir", out]
                subprocess.run(list(map(str, words)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                step, inside, *parts = np.diff(json.loads(times.read_text()), axis=0)[args.steps :].T
                shares.append([100 * float(np.median(part / step)) for part in (step - inside, *parts)])
            question = f"outside forward, backward and optimizer, {name}, {args.config}, {args.image_size} px"
            print(json.dumps({"question": question, "unit": "% of a step", "found": shares}))
            outside, *parts = np.median(shares, axis=0)
            found = f"{min(shares)[0]:.1f} to {max(shares)[0]:.1f} % of a step"
            named = ", ".join(f"{part} {share:.1f}" for part, share in zip(OUTSIDE, parts, strict=True))
            lines.append(f"| {question} | {found}: {named}, the rest {outside - sum(parts):.1f} | {outside:.1f} % |")
    print(machine("cpu"), *lines, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:  # a process of its own for each run of a script
        times, script, *flags = sys.argv[2:]
        record(Path(times), script, flags)
    else:
        main()
