"""Does it pay to tune the VAE through the UNet's alignment (REPA-E, Leng et al. 2025, arXiv:2504.10483)?

python benchmarks/end_to_end.py --data-dir photos --vae-checkpoint vae_models --tune-minutes 2 --minutes 3

A trained VAE learns on beside a fresh UNet: its own losses, and the alignment of the UNet with EfficientNet's features, whose gradient
goes through the frozen UNet and normalised latents into the encoder; the denoising loss stops at the latents. Then train_unet.py on the
VAE as it was and on the tuned one in equal minutes, and on the VAE as it was with the minutes of tuning as well. Judged on the validation
photos, on the CPU; nothing else should be running.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import QUIET, ROOT, launch, machine, tool
from diffusers import DDPMScheduler
from torch.nn import functional as F

sys.path.insert(0, str(ROOT))
from corel_diffusers.alignment import cache_features, feature_scale, misalignment
from corel_diffusers.arguments import UNetArguments, VAEArguments
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels, to_float
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.latents import cache_moments, load_vae, measure_scale
from corel_diffusers.losses import denoising_loss, kl_divergence, min_snr_weight, prediction_target
from corel_diffusers.models import UNetInTraining, VAEWithPosterior, build_unet, inner_grid
from corel_diffusers.muon import build_optimizer
from corel_diffusers.perceptual import PerceptualLoss
from corel_diffusers.precision import autocast, resolve_precision
from train_unet import trained_size_px

CPU = torch.device("cpu")
PULL = 1.5  # weight of the alignment in the VAE's loss, as in the paper


def tune(args: argparse.Namespace, folder: Path) -> int:
    """Trains VAE and UNet together and leaves the VAE in the folder; the photos that it saw."""
    torch.manual_seed(0)
    vae = load_vae(args.vae_checkpoint).requires_grad_(True)
    size_px, precision = trained_size_px(vae), resolve_precision("auto", "cpu")
    photos, pixels = cache_pixels(load_photos(args.data_dir), size_px)
    labels = torch.tensor(photos["train"]["label"][:])
    unet = build_unet("tiny", size_px, vae, int(labels.max()) + 1)
    latent_shape = cache_moments(vae, pixels["train"], CPU).shape[3:]
    features = cache_features(pixels["train"], None, inner_grid(unet, latent_shape), CPU)
    mean, std = feature_scale(features, CPU)
    model, coder = UNetInTraining(unet, changes=0, features=features.shape[2]), VAEWithPosterior(vae)
    ours, its = UNetArguments(), VAEArguments()
    optimizer = build_optimizer("muon", model, ours.LEARNING_RATES["tiny"], ours.weight_decay, ours.MUON_SCALE)
    its_optimizer = build_optimizer("muon", vae, 1e-4, its.weight_decay, its.MUON_SCALE)
    plan = json.loads((args.vae_checkpoint / "run.json").read_text())["plan"]  # a longer run's has weights of its own
    perceptual_weight, kl_weight = plan.get("perceptual_weight", 0.3), plan.get("kl_weight", 0.4 / np.prod(size_px))
    scheduler, perceptual = DDPMScheduler(prediction_type="v_prediction", clip_sample=False), PerceptualLoss("efficientnet-lite0")

    began, seen = time.monotonic(), 0
    while (share := (time.monotonic() - began) / (60 * args.tune_minutes)) < 1:
        for part, rate in ((optimizer, ours.LEARNING_RATES["tiny"]), (its_optimizer, 1e-4)):
            for group in part.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0) * (0.5 + 0.5 * np.cos(np.pi * share))
        chosen, mirrored = np.random.default_rng(seen).integers(len(labels), size=16), seen // 16 % 2
        batch = to_float(torch.from_numpy(pixels["train"].values[chosen]))
        batch = batch.flip(-1) if mirrored else batch
        wanted = torch.from_numpy(features[chosen][:, mirrored])
        noise, timesteps = torch.randn(16, vae.config.latent_channels, *latent_shape), torch.randint(1000, (16,))
        label, untold = labels[chosen], torch.zeros(16, 0)
        with autocast(precision, "cpu"):
            drawn = torch.randn_like(noise)
            made, center, logvar, _ = coder(batch, drawn)
            loss = F.l1_loss(made, batch) + perceptual_weight * perceptual(made, batch)
            latents = center + (0.5 * logvar).exp() * drawn
            latents = F.batch_norm(latents.float(), None, None, training=True)
            model.requires_grad_(False)
            _, guess = model(scheduler.add_noise(latents, noise, timesteps), timesteps, label, untold)
            model.requires_grad_(True)
        kl = kl_divergence(center, logvar).mean()
        (loss + kl_weight * kl + PULL * misalignment(guess, wanted, mean, std).mean()).backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
        latents = latents.detach()
        with autocast(precision, "cpu"):
            prediction, guess = model(scheduler.add_noise(latents, noise, timesteps), timesteps, label, untold)
        loss = denoising_loss(prediction, prediction_target(scheduler, latents, noise, timesteps))
        loss = (min_snr_weight(scheduler, timesteps, ours.min_snr_gamma) * loss).mean()
        aligned = misalignment(guess, wanted, mean, std).mean()
        (loss + ours.align_weight * aligned).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += 16
        if seen % 800 == 0:
            print(f"{seen} photos: alignment {1 - float(aligned):.3f}, KL {float(kl):.0f} nats", file=sys.stderr)
    vae.eval()
    center, spread = measure_scale(cache_moments(vae, pixels["train"], CPU))
    vae.register_to_config(latents_mean=center, latents_std=spread)
    vae.save_pretrained(folder)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--vae-checkpoint", type=Path, required=True, help="the --output-dir of train_vae.py")
    parser.add_argument("--output-dir", type=Path, default=Path("end_to_end"))
    parser.add_argument("--tune-minutes", type=float, default=2)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--num-images", type=int, default=300)
    args = parser.parse_args()
    args.data_dir, args.vae_checkpoint, args.output_dir = (p.resolve() for p in (args.data_dir, args.vae_checkpoint, args.output_dir))
    tuned = args.output_dir / "vae"
    seen = tune(args, tuned)
    print(f"{machine('cpu')}; {seen} photos in {args.tune_minutes:g} minutes of tuning\n")
    print("| VAE | PSNR (dB) | its KID x1000 [95 %] | KID x1000 [95 %] | precision | recall |\n|---|---|---|---|---|---|")
    rows = [("as it was", args.vae_checkpoint, args.minutes), ("tuned through the alignment", tuned, args.minutes)]
    rows.append(("as it was, and the minutes of tuning as well", args.vae_checkpoint, args.minutes + args.tune_minutes))
    for name, vae, minutes in rows:
        run = args.output_dir / name.replace(" ", "-")
        flags = ["--data-dir", args.data_dir, "--output-dir", run]
        launch(ROOT / "train_unet.py", *flags, "--config", "tiny", "--vae-checkpoint", vae, "--max-train-minutes", minutes, *QUIET)
        tool("evaluate", *flags, "--pipeline", run, "--num-images", args.num_images, "--against", "validation")
        found = json.loads((run / "evaluation.json").read_text())
        floor, g = found["reconstruction"], found["generation"]
        cells = f"{floor['psnr_db']:.2f} | {with_interval(floor)} | {with_interval(g)} | {g['precision']:.2f} | {g['recall']:.2f}"
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
