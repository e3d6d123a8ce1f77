"""How long does a training step of each preset take, in each precision and, on a CPU, with each attention kernel?

python benchmarks/presets.py --configs tiny base

The training scripts time the same steps to plan a run: forward, backward and optimizer, on artificial photos. The
script prints a table of milliseconds per step. On a GPU, the table also lists the peak memory in GiB.
"""

import argparse
import json
from itertools import product

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import machine_name

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.models.vae import build_vae
from corel_diffusers.runtime.precision import set_precision
from corel_diffusers.runtime.timing import photos_per_second
from corel_diffusers.training import unet_models, vae_models
from corel_diffusers.training.presets import UNET_PRESETS, VAE_PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["tiny", "base"], choices=["tiny", "base", "large"])
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    settings = (
        [(precision, "fused") for precision in ("no", "fp16", "bf16")]
        if gpu
        else list(product(("no", "bf16"), ("fused", "math")))
    )
    lines = []
    for series, kind, models in (
        (VAE_PRESETS, VAEArguments, vae_models),
        (UNET_PRESETS, UNetArguments, unet_models),
    ):
        for preset in (preset for preset in series.presets if preset.config in args.configs):
            size_px, cells = (preset.side_px, preset.side_px), []
            script_args = kind(config=preset.config, image_size=str(preset.side_px), batch_size=preset.batch_size)
            script_args = script_args.resolved({})
            for precision, attention in settings:
                AcceleratorState._reset_state(True)
                accelerator = Accelerator(mixed_precision=precision)
                set_precision(accelerator, precision)
                step = vae = None  # free the memory of the previous step
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                vae = [build_vae(preset.config, size_px).to(accelerator.device)] if kind.MODEL == "unet" else []
                step = models.trial_step(
                    script_args, accelerator, *vae, preset.config, size_px, preset.batch_size, attention
                )
                ms = 1e3 * preset.batch_size / photos_per_second(step, preset.batch_size)
                result = {
                    "model": f"train_{kind.MODEL}",
                    "config": preset.config,
                    "precision": precision,
                    "attention": attention,
                    "ms": ms,
                }
                print(
                    json.dumps(result | ({"gib": torch.cuda.max_memory_allocated() / 2**30} if gpu else {})), flush=True
                )
                cells.append(f"{ms:,.0f}" + (f", {torch.cuda.max_memory_allocated() / 2**30:.1f}" if gpu else ""))
            name = f"{kind.MODEL} {preset.config}, {preset.side_px} px, batch {preset.batch_size}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    print(
        f"{machine_name()}\n\n| step | {' | '.join(f'{p}, {a}' for p, a in settings)} |\n|---{'|---' * len(settings)}|"
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
