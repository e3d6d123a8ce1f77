"""What does a training step of each preset cost on this machine, in each precision and, on a CPU, with each kernel of attention?

python benchmarks/presets.py --configs tiny base

The steps are those that the scripts themselves time to plan with: forward, backward and optimizer, on made-up photos. Prints a table of
milliseconds, and on a GPU of GiB at the peak.
"""

import argparse
import json
import sys
from itertools import product

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import ROOT, machine

sys.path.insert(0, str(ROOT))
import train_unet
import train_vae
from corel_diffusers.arguments import UNetArguments, VAEArguments
from corel_diffusers.models import build_vae
from corel_diffusers.planning import UNET_LADDER, VAE_LADDER, photos_per_second
from corel_diffusers.precision import use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["tiny", "base"], choices=["tiny", "base", "large"])
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ways = [(precision, "fused") for precision in ("no", "fp16", "bf16")] if gpu else list(product(("no", "bf16"), ("fused", "math")))
    lines = []
    for ladder, kind, script in ((VAE_LADDER, VAEArguments, train_vae), (UNET_LADDER, UNetArguments, train_unet)):
        for rung in (rung for rung in ladder.rungs if rung.config in args.configs):
            size_px, cells = (rung.side_px, rung.side_px), []
            given = kind(config=rung.config, image_size=str(rung.side_px), batch_size=rung.batch_size)
            given.fill({})
            for precision, attention in ways:
                AcceleratorState._reset_state(True)
                accelerator = Accelerator(mixed_precision=precision)
                use(accelerator, precision, attention)
                step = vae = None  # the one before takes no memory any more
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                vae = [build_vae(rung.config, size_px).to(accelerator.device)] if script is train_unet else []
                step = script.trial_step(given, accelerator, *vae, rung.config, size_px, rung.batch_size)
                ms = 1e3 * rung.batch_size / photos_per_second(step, rung.batch_size)
                found = {"model": script.__name__, "config": rung.config, "precision": precision, "attention": attention, "ms": ms}
                print(json.dumps(found | ({"gib": torch.cuda.max_memory_allocated() / 2**30} if gpu else {})), flush=True)
                cells.append(f"{ms:,.0f}" + (f", {torch.cuda.max_memory_allocated() / 2**30:.1f}" if gpu else ""))
            name = f"{script.__name__.removeprefix('train_')} {rung.config}, {rung.side_px} px, batch {rung.batch_size}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    print(f"{machine()}\n\n| step | {' | '.join(f'{p}, {a}' for p, a in ways)} |\n|---{'|---' * len(ways)}|")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
