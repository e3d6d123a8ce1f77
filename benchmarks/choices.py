"""Where do the presets come from? Each choice beside the `tiny` preset's own, after equal minutes.

python benchmarks/choices.py vae --data-dir photos --minutes 3 --image-size 64
python benchmarks/choices.py unet --data-dir photos --minutes 5 --vae-checkpoint vae_models

One after the other, nothing else running. Measured on the validation photos: choices are made on them, so that the test photos stay
for what is reported. The VAE's last column is the KL in nats a latent value: the less the latents carry, the sooner a UNet learns
them. The UNet's loss can be compared where prediction and schedule are the same.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from common import QUIET, ROOT, launch, machine, tool
from diffusers import AutoencoderKL, UNet2DModel

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.evaluation.evaluate import reconstruct, reconstruction_scores
from corel_diffusers.evaluation.features import load_network, photo_features
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import read_metrics, write_json, write_text
from corel_diffusers.models import load_config, parameter_count

Choices = dict[str, tuple[dict, list]]  # name: (changes to the tiny config, more flags)

F8 = {"block_out_channels": [16, 32, 64, 128]}
VAE: Choices = {
    "tiny: f4, 4 channels, [16, 32, 64]": ({}, []),
    "f4, 8 channels": ({"latent_channels": 8}, []),
    "f4, 16 channels": ({"latent_channels": 16}, []),
    "f8, 4 channels, [16, 32, 64, 128]": (F8, []),
    "f8, 8 channels": (F8 | {"latent_channels": 8}, []),
    "f8, 16 channels": (F8 | {"latent_channels": 16}, []),
    "f4, 8 norm groups, attention": ({"norm_num_groups": 8, "mid_block_add_attention": True}, []),
    "f4, [32, 64, 128]": ({"block_out_channels": [32, 64, 128]}, []),
    "f4, [16, 64, 128]": ({"block_out_channels": [16, 64, 128]}, []),
    "AdamW": ({}, ["--optimizer", "adamw"]),
    "KL weight 5e-5": ({}, ["--kl-weight", 5e-5]),
    "KL weight 1e-6": ({}, ["--kl-weight", 1e-6]),
    "KL weight 2e-4": ({}, ["--kl-weight", 2e-4]),
    "whole photos only": ({}, ["--crop-chance", 0]),
    "crops only": ({}, ["--crop-chance", 1]),
    "no perceptual term": ({}, ["--no-perceptual"]),
    "adversarial term": ({}, ["--adversarial-weight", 0.2]),
    "twice the learning rate": ({}, ["--lr", 2e-4]),
    "batch 4": ({}, ["--batch-size", 4]),
    "batch 8": ({}, ["--batch-size", 8]),
}
UNET: Choices = {
    "tiny: [32, 64, 128], batch 16": ({}, []),
    "batch 8": ({}, ["--batch-size", 8]),
    "batch 32": ({}, ["--batch-size", 32]),
    "[64, 128, 192]": ({"block_out_channels": [64, 128, 192], "norm_num_groups": 32}, []),
    "no attention at half size": (
        {
            "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        },
        [],
    ),
    "time as a shift only": ({"resnet_time_scale_shift": "default"}, []),
    "no alignment": ({}, ["--align-weight", 0]),
    "alignment 1": ({}, ["--align-weight", 1]),
    "no min-SNR": ({}, ["--min-snr-gamma", 0]),
    "log-normal timesteps": ({}, ["--min-snr-gamma", 0, "--timesteps", "log-normal"]),
    "predicts noise": ({}, ["--prediction-type", "epsilon"]),
    "cosine schedule": ({}, ["--schedule", "cosine"]),
    "zero terminal SNR": ({}, ["--zero-terminal-snr"]),
    "half the learning rate": ({}, ["--lr", 1e-3]),
    "twice the learning rate": ({}, ["--lr", 4e-3]),
    "8 changed views of each photo": ({}, ["--views", 8]),
}


def judge_vae(args: argparse.Namespace) -> Callable[[Path], tuple[dict, str]]:
    """A VAE's folder -> its scores and its cells of the table."""
    _, pixels = cache_pixels(load_photos(args.data_dir), (args.image_size, args.image_size))
    network = load_network("efficientnet-lite0", torch.device("cpu"))
    real = photo_features(network, pixels["validation"])

    def judge(folder: Path) -> tuple[dict, str]:
        vae = AutoencoderKL.from_pretrained(folder).eval()
        scores = reconstruction_scores(reconstruct(vae, pixels["validation"].values), pixels["validation"].values, network, real)
        values = vae.config.latent_channels * (args.image_size // 2 ** (len(vae.config.block_out_channels) - 1)) ** 2
        nats = min(read_metrics(folder / "metrics.jsonl"), key=lambda record: record["val_loss"])["val_kl"] / values
        cells = [parameter_count(vae).split()[0], f"{scores['psnr_db']:.2f}", f"{scores['ssim']:.3f}", f"{scores['perceptual']:.3f}"]
        return scores | {"nats_a_value": nats}, " | ".join([*cells, with_interval(scores), f"{nats:.2f}"])

    return judge


def judge_unet(args: argparse.Namespace) -> Callable[[Path], tuple[dict, str]]:
    """A pipeline's folder -> its scores and its cells of the table."""

    def judge(folder: Path) -> tuple[dict, str]:
        flags = ["--data-dir", args.data_dir, "--output-dir", folder, "--num-images", args.num_images, "--against", "validation"]
        tool("evaluate", "--pipeline", folder, *flags)
        scores = json.loads((folder / "evaluation.json").read_text())["generation"]
        loss = min(record["val_loss"] for record in read_metrics(folder / "metrics.jsonl"))
        size = parameter_count(UNet2DModel.from_pretrained(folder / "unet")).split()[0]
        cells = [size, f"{loss:.4f}", with_interval(scores), f"{scores['precision']:.2f}", f"{scores['recall']:.2f}"]
        return scores | {"val_loss": loss}, " | ".join(cells)

    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["vae", "unet"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("choices"))
    parser.add_argument("--vae-checkpoint", type=Path, help="for unet")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=150, help="for unet")
    parser.add_argument("--only", nargs="+", type=int, help="rows of the list, from 0")
    args = parser.parse_args()
    args.data_dir, args.output_dir = args.data_dir.resolve(), args.output_dir.resolve()
    if (args.model == "unet") != bool(args.vae_checkpoint):
        parser.error("--vae-checkpoint goes with unet, and only with it")

    choices, judge, columns, batch_size = {
        "vae": (VAE, judge_vae, ["PSNR (dB)", "SSIM", "perceptual", "KID x1000 [95 %]", "nats a value"], 2),
        "unet": (UNET, judge_unet, ["held-out loss", "KID x1000 [95 %]", "precision", "recall"], 16),
    }[args.model]
    judge = judge(args)
    names = ["choice", "photos/s", "M parameters", *columns]
    title = f"{args.minutes:g} minutes each at {args.image_size} px, {machine()}"
    numbers, rows = args.output_dir / f"{args.model}.json", {}
    if args.only and numbers.is_file():  # the other rows stay as they were
        rows = json.loads(numbers.read_text())["rows"]
    for place, (name, (changes, flags)) in enumerate(choices.items()):
        if args.only is not None and place not in args.only:
            continue
        folder = args.output_dir / f"{args.model}-{place:02d}"
        config = args.output_dir / f"{args.model}-{place:02d}.json"
        write_json(config, load_config(args.model, "tiny") | changes)
        shared = ["--data-dir", args.data_dir, "--output-dir", folder, "--config", config, "--max-train-minutes", args.minutes, *QUIET]
        shared += ["--image-size", args.image_size, "--batch-size", batch_size, "--lr", {"vae": 1e-4, "unet": 2e-3}[args.model]]
        shared += ["--vae-checkpoint", args.vae_checkpoint.resolve()] if args.vae_checkpoint else []
        launch(ROOT / f"train_{args.model}.py", *shared, *flags)

        last = read_metrics(folder / "metrics.jsonl")[-1]
        speed = last["images_seen"] / last["seconds"]
        scores, cells = judge(folder)
        rows[name] = {"row": f"| {name} | {speed:.0f} | {cells} |"} | scores | {"photos_per_second": speed}
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(rows[known]["row"] for known in choices if known in rows)]
        write_json(numbers, {"title": title, "rows": rows})
        write_text(args.output_dir / f"{args.model}.md", "\n".join([title, "", *lines]) + "\n")
    print((args.output_dir / f"{args.model}.md").read_text())


if __name__ == "__main__":
    main()
