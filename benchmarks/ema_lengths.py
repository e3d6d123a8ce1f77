"""Does it pay to choose the length of the average of the weights after training?

python benchmarks/ema_lengths.py --data-dir photos --vae-checkpoint vae_models --epochs 200

Trains a UNet with a falling learning rate and one with a constant rate, keeps a snapshot of the average every twentieth of the run, and
puts them together to power-function averages of several lengths (Karras et al. 2024, arXiv:2312.02696, section 3.1): weights of
the time t count as t^gamma. Each is judged on the validation photos: the denoising loss that training measures, and samples.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import QUIET, ROOT, launch, machine, tool
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from corel_diffusers.checkpoints import find_checkpoints
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import write_text
from corel_diffusers.latents import cache_moments

sys.path.insert(0, str(ROOT))
from train_unet import fixed_draws, measure, trained_size_px

LENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2)  # sigma_rel: the spread of the average's times, as a share of the run
RATES = {"cosine": "falling", "none": "constant"}


def exponent(sigma_rel: float) -> float:
    """gamma of a power-function average of that length: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (eq. 126)."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


def average(snapshots: list[list[torch.Tensor]], gamma: float) -> list[torch.Tensor]:
    """The snapshots, equally far from each other and the last at the end, weighted as t^gamma."""
    weights = ((np.arange(len(snapshots)) + 1) / len(snapshots)) ** gamma
    weights /= weights.sum()
    return [sum(weight * value for weight, value in zip(weights, values, strict=True)) for values in zip(*snapshots, strict=True)]


def averages(run: Path, unet: UNet2DModel) -> dict[str, list[torch.Tensor]]:
    """The UNet's weights at the end and in each average, by name. A checkpoint's averages have the UNet's parameters first."""
    checkpoints, names = find_checkpoints(run), [name for name, _ in unet.named_parameters()]
    snapshots = []
    for checkpoint in checkpoints:
        shadow = load_file(checkpoint / "ema.safetensors")
        snapshots.append([shadow[str(place)] for place in range(len(names))])
    last = load_file(checkpoints[-1] / "model.safetensors")
    found = {"no average": [last[f"unet.{name}"] for name in names], "the run's, at its end": snapshots[-1]}
    return found | {f"sigma_rel {length:g}": average(snapshots, exponent(length)) for length in LENGTHS}


def judge(pipe: DiffusionPipeline, args: argparse.Namespace) -> Callable[[Path], str]:
    """A pipeline's folder -> its cells of the table, for pipelines with the VAE, the noise and the classes of `pipe`."""
    photos, pixels = cache_pixels(load_photos(args.data_dir), trained_size_px(pipe.vae))
    moments = cache_moments(pipe.vae, pixels["validation"], pipe.device)
    labels = np.array(photos["validation"]["label"][:]) if pipe.config.class_names else None
    draws = fixed_draws(pipe.vae, moments[:, 0], labels, pipe.scheduler, pipe.device)

    def cells(folder: Path) -> str:
        loss = measure(UNet2DModel.from_pretrained(folder / "unet"), pipe.scheduler, draws)["loss"]
        flags = ["--data-dir", args.data_dir, "--output-dir", folder, "--num-images", args.num_images, "--against", "validation"]
        tool("evaluate", "--pipeline", folder, *flags)
        scores = json.loads((folder / "evaluation.json").read_text())["generation"]
        return f"{loss:.4f} | {with_interval(scores)} | {scores['precision']:.2f} | {scores['recall']:.2f}"

    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--vae-checkpoint", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("ema_lengths"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-images", type=int, default=150)
    args = parser.parse_args()
    args.data_dir, args.output_dir = args.data_dir.resolve(), args.output_dir.resolve()
    rows = ["| learning rate | average | held-out loss | KID x1000 [95 %] | precision | recall |", "|---|---|---|---|---|---|"]
    for rate, course in RATES.items():
        run = args.output_dir / course
        flags = ["--data-dir", args.data_dir, "--vae-checkpoint", args.vae_checkpoint.resolve(), "--output-dir", run, "--config", "tiny"]
        flags += ["--epochs", args.epochs, "--lr-scheduler", rate, "--early-stopping-patience", 0, "--oscillation-window", 0, *QUIET]
        launch(ROOT / "train_unet.py", *flags, "--checkpoint-every", max(1, args.epochs // 20), "--keep-checkpoints", 0)
        pipe = DiffusionPipeline.from_pretrained(run, trust_remote_code=True)
        cells = judge(pipe, args)
        rows.append(f"| {course} | the run's, at its best validation | {cells(run)} |")
        for name, weights in averages(run, pipe.unet).items():
            with torch.no_grad():
                for parameter, value in zip(pipe.unet.parameters(), weights, strict=True):
                    parameter.copy_(value)
            pipe.save_pretrained(run / "averaged")
            rows.append(f"| {course} | {name} | {cells(run / 'averaged')} |")
            write_text(args.output_dir / "ema_lengths.md", f"{args.epochs} epochs each, {machine()}\n\n" + "\n".join(rows) + "\n")
    print((args.output_dir / "ema_lengths.md").read_text())


if __name__ == "__main__":
    main()
