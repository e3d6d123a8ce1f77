"""Which VAE keeps most of a photo after so many minutes? Factor, channels, widths and loss, each beside the `tiny` preset.

python benchmarks/vae_choices.py --data-dir photos --minutes 3 --image-size 64

One after the other, nothing else running. Measured on the validation photos: choices are made on them, so that the test photos stay for
what is reported. The last column is the KL in nats a latent value: the less the latents carry, the sooner a UNet learns them.
"""

import argparse
from pathlib import Path

import torch
from common import QUIET, ROOT, launch, machine
from diffusers import AutoencoderKL

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.evaluation.evaluate import reconstruct, reconstruction_scores
from corel_diffusers.evaluation.features import load_network, photo_features
from corel_diffusers.files import read_metrics, write_json, write_text
from corel_diffusers.models import load_config

F8 = {"block_out_channels": [16, 32, 64, 128]}
CHOICES: dict[str, tuple[dict, list]] = {  # name: (changes to the tiny config, more flags)
    "tiny: f4, 4 channels, [16, 32, 64]": ({}, []),
    "f4, 8 channels": ({"latent_channels": 8}, []),
    "f4, 16 channels": ({"latent_channels": 16}, []),
    "f8, 4 channels, [16, 32, 64, 128]": (F8, []),
    "f8, 8 channels": (F8 | {"latent_channels": 8}, []),
    "f8, 16 channels": (F8 | {"latent_channels": 16}, []),
    "f4, [32, 64, 128]": ({"block_out_channels": [32, 64, 128]}, []),
    "f4, [16, 64, 128]": ({"block_out_channels": [16, 64, 128]}, []),
    "f4, no attention": ({"mid_block_add_attention": False}, []),
    "AdamW": ({}, ["--optimizer", "adamw"]),
    "KL weight 1e-6": ({}, ["--kl-weight", 1e-6]),
    "KL weight 2e-4": ({}, ["--kl-weight", 2e-4]),
    "whole photos only": ({}, ["--crop-chance", 0]),
    "crops only": ({}, ["--crop-chance", 1]),
    "no perceptual term": ({}, ["--no-perceptual"]),
    "adversarial term": ({}, ["--adversarial-weight", 0.2]),
    "twice the learning rate": ({}, ["--lr", 2e-3]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("vae_choices"))
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", type=int, help="rows of the list, from 0")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    chosen = [name for place, name in enumerate(CHOICES) if args.only is None or place in args.only]

    _, pixels = cache_pixels(load_photos(args.data_dir.resolve()), (args.image_size, args.image_size))
    network = load_network("efficientnet-lite0", torch.device("cpu"))
    real = photo_features(network, pixels["validation"])
    results, lines = (
        {},
        [
            "| VAE | M parameters | photos/s | PSNR (dB) | SSIM | perceptual | KID x1000 | nats a value |",
            "|---|---|---|---|---|---|---|---|",
        ],
    )
    for name in chosen:
        changes, flags = CHOICES[name]
        folder = args.output_dir / f"{list(CHOICES).index(name):02d}"
        config = folder / "config-to-train.json"
        write_json(config, load_config("vae", "tiny") | changes)
        shared = ["--data-dir", args.data_dir.resolve(), "--output-dir", folder, "--config", config, "--image-size", args.image_size]
        shared += ["--batch-size", 8, "--lr", 1e-3, "--max-train-minutes", args.minutes, *QUIET]
        launch(ROOT / "train_vae.py", *shared, *flags)

        vae = AutoencoderKL.from_pretrained(folder).eval()
        scores = reconstruction_scores(reconstruct(vae, pixels["validation"].values), pixels["validation"].values, network, real)
        last = read_metrics(folder / "metrics.jsonl")[-1]
        values = vae.config.latent_channels * (args.image_size // 2 ** (len(vae.config.block_out_channels) - 1)) ** 2
        size, speed = sum(p.numel() for p in vae.parameters()) / 1e6, last["images_seen"] / last["seconds"]
        results[name] = scores | {"kl": last["val_kl"], "photos_per_second": speed}
        lines.append(
            f"| {name} | {size:.1f} | {speed:.0f} | {scores['psnr_db']:.2f} | {scores['ssim']:.3f} | {scores['perceptual']:.3f} "
            f"| {scores['kid_e3']:.0f} | {last['val_kl'] / values:.2f} |"
        )
        title = f"{args.minutes:g} minutes each at {args.image_size} px, {machine()}"
        write_json(args.output_dir / "vae_choices.json", {"title": title, "results": results})
        write_text(args.output_dir / "vae_choices.md", "\n".join([title, "", *lines]) + "\n")
    print((args.output_dir / "vae_choices.md").read_text())


if __name__ == "__main__":
    main()
