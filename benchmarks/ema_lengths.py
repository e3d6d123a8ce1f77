"""Is it worth choosing the length of the weights' average (EMA) after training?

python benchmarks/ema_lengths.py --data-dir photos --vae-checkpoint vae_models --epochs 200

Trains one UNet with a falling learning rate and one with a constant learning rate. Each run keeps a snapshot of its
average every twentieth of the run. The script combines the snapshots into power-function averages of several lengths
(Karras et al. 2024, arXiv:2312.02696, section 3.1): the weights at time t count as t^gamma. Each average is judged on
the validation photos, by the denoising loss that training measures and by samples.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import QUIET, ROOT, evaluate, machine_name, run_script
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.data.latents import cache_moments
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import write_text
from corel_diffusers.losses.diffusion import Diffusion
from corel_diffusers.models.configs import trained_size_px
from corel_diffusers.training.checkpoints import find_checkpoints
from corel_diffusers.training.gauge import FIXED_NOISE_PAIRS, denoising_losses, fixed_noise_set

# sigma_rel: the standard deviation of the times that an average covers, as a fraction of the run
LENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2)
RATES = {"cosine": "falling", "none": "constant"}


def exponent(sigma_rel: float) -> float:
    """Return gamma of the power-function average of this length.

    It solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (eq. 126).
    """
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


def weighted_average(snapshots: list[list[torch.Tensor]], gamma: float) -> list[torch.Tensor]:
    """Return the average of the snapshots, weighted by t^gamma.

    The snapshots have equal distances in time. The last one is at the end of the run.
    """
    weights = ((np.arange(len(snapshots)) + 1) / len(snapshots)) ** gamma
    weights /= weights.sum()
    return [
        sum(weight * value for weight, value in zip(weights, values, strict=True))
        for values in zip(*snapshots, strict=True)
    ]


def weights_by_name(run: Path, unet: UNet2DModel) -> dict[str, list[torch.Tensor]]:
    """Return the UNet's weights at the end of the run and in each average, by name.

    The file ema.safetensors of a checkpoint lists the UNet's parameters first.
    """
    checkpoints, names = find_checkpoints(run), [name for name, _ in unet.named_parameters()]
    snapshots = []
    for checkpoint in checkpoints:
        ema = load_file(checkpoint / "ema.safetensors")
        snapshots.append([ema[str(index)] for index in range(len(names))])
    model = load_file(checkpoints[-1] / "model.safetensors")
    weights = {"no average": [model[f"unet.{name}"] for name in names], "the run's, at its end": snapshots[-1]}
    return weights | {f"sigma_rel {length:g}": weighted_average(snapshots, exponent(length)) for length in LENGTHS}


def judge(pipe: DiffusionPipeline, args: argparse.Namespace) -> Callable[[Path], str]:
    """Return a function from a pipeline's folder to its cells of the table.

    The pipelines must have the VAE, the noise schedule and the classes of `pipe`.
    """
    photos, pixels = cache_pixels(load_photos(args.data_dir), trained_size_px(pipe.vae))
    moments = cache_moments(pipe.vae, pixels["validation"], pipe.device)
    labels = np.array(photos["validation"]["label"][:]) if pipe.config.class_names else None
    diffusion = Diffusion(pipe.scheduler, UNetArguments())
    repeats = -(-FIXED_NOISE_PAIRS // len(moments))
    noise_set = fixed_noise_set(pipe.vae, moments[:, 0], labels, repeats, diffusion)

    def cells(folder: Path) -> str:
        loss = denoising_losses(UNet2DModel.from_pretrained(folder / "unet"), diffusion, [noise_set])["loss"]
        results = evaluate(args.data_dir, folder, args.num_images, "validation", "--pipeline", folder)
        scores = results["generation"]
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
    rows = [
        "| learning rate | average | held-out loss | KID x1000 [95 %] | precision | recall |",
        "|---|---|---|---|---|---|",
    ]
    for lr_scheduler, learning_rate in RATES.items():
        run = args.output_dir / learning_rate
        flags = [
            "--data-dir",
            args.data_dir,
            "--vae-checkpoint",
            args.vae_checkpoint.resolve(),
            "--output-dir",
            run,
            "--config",
            "tiny",
        ]
        flags += [
            "--epochs",
            args.epochs,
            "--lr-scheduler",
            lr_scheduler,
            "--early-stopping-patience",
            0,
            "--oscillation-window",
            0,
            *QUIET,
        ]
        run_script(
            ROOT / "train_unet.py", *flags, "--checkpoint-every", max(1, args.epochs // 20), "--keep-checkpoints", 0
        )
        pipe = DiffusionPipeline.from_pretrained(run, trust_remote_code=True)
        cells = judge(pipe, args)
        rows.append(f"| {learning_rate} | the run's, at its best validation | {cells(run)} |")
        for name, weights in weights_by_name(run, pipe.unet).items():
            with torch.no_grad():
                for parameter, value in zip(pipe.unet.parameters(), weights, strict=True):
                    parameter.copy_(value)
            pipe.save_pretrained(run / "averaged")
            rows.append(f"| {learning_rate} | {name} | {cells(run / 'averaged')} |")
            write_text(
                args.output_dir / "ema_lengths.md",
                f"{args.epochs} epochs each, {machine_name()}\n\n" + "\n".join(rows) + "\n",
            )
    print((args.output_dir / "ema_lengths.md").read_text())


if __name__ == "__main__":
    main()
