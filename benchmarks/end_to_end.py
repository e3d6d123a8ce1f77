"""Is it worth tuning the VAE through the UNet's alignment loss (REPA-E, Leng et al. 2025, arXiv:2504.10483)?

python benchmarks/end_to_end.py --data-dir photos --vae-checkpoint vae_models --tune-minutes 2 --minutes 3

First, the script trains a trained VAE further, together with a fresh UNet. The VAE has its own losses and the alignment
loss. The alignment loss compares the UNet's inner features with EfficientNet's features. Its gradient goes through the
frozen UNet and the normalised latents into the encoder. The gradient of the denoising loss stops at the latents.

Then train_unet.py trains three UNets: on the original VAE and on the tuned VAE for the same number of minutes, and on
the original VAE for these minutes plus the minutes of tuning. All are judged on the validation photos, on the CPU. Run
nothing else at the same time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import QUIET, ROOT, machine_name, run_command, run_script
from diffusers import DDPMScheduler
from torch.nn import functional as F

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.features import cache_features, feature_scale
from corel_diffusers.data.latents import cache_moments, load_vae, measure_latents
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels, to_float
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.losses.alignment import alignment_loss
from corel_diffusers.losses.diffusion import denoising_loss, min_snr_weight, prediction_target
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.losses.vae import kl_divergence
from corel_diffusers.models.configs import downsample_factor, latent_shape, trained_size_px
from corel_diffusers.models.unet import UNetForTraining, build_unet, inner_stride
from corel_diffusers.models.vae import VAEWithPosterior
from corel_diffusers.runtime.precision import autocast, resolve_precision
from corel_diffusers.training.optimizers import build_optimizer

CPU = torch.device("cpu")
VAE_ALIGN_WEIGHT = 1.5  # weight of the alignment loss in the VAE's loss, as in the paper


def tune(args: argparse.Namespace, folder: Path) -> int:
    """Train the VAE and a fresh UNet together and save the VAE in the folder. Return the number of images seen."""
    torch.manual_seed(0)
    vae = load_vae(args.vae_checkpoint).requires_grad_(True)
    size_px, precision = trained_size_px(vae), resolve_precision("auto", "cpu")
    photos, pixels = cache_pixels(load_photos(args.data_dir), size_px)
    labels = torch.tensor(photos["train"]["label"][:])
    unet = build_unet("tiny", size_px, vae, int(labels.max()) + 1)
    features = cache_features(pixels["train"], None, downsample_factor(vae) * inner_stride(unet), CPU)
    mean, std = feature_scale(features, CPU)
    model, vae_model = UNetForTraining(unet, changes=0, features=features.shape[2]), VAEWithPosterior(vae)
    unet_defaults, vae_defaults = UNetArguments(), VAEArguments()
    optimizer = build_optimizer(
        "muon",
        model,
        unet_defaults.LEARNING_RATES["tiny"],
        unet_defaults.weight_decay,
        unet_defaults.MUON_SCALE,
        model.ADAMW_LAYERS,
    )
    vae_optimizer = build_optimizer(
        "muon", vae, 1e-4, vae_defaults.weight_decay, vae_defaults.MUON_SCALE, vae_model.ADAMW_LAYERS
    )
    # The plan of a long run sets its own loss weights.
    plan = json.loads((args.vae_checkpoint / "run.json").read_text())["plan"]
    perceptual_weight, kl_weight = plan.get("perceptual_weight", 0.3), plan.get("kl_weight", 0.4 / np.prod(size_px))
    scheduler, perceptual = (
        DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        PerceptualLoss("efficientnet-lite0"),
    )

    start, images_seen = time.monotonic(), 0
    while (fraction := (time.monotonic() - start) / (60 * args.tune_minutes)) < 1:
        for current_optimizer, base_lr in ((optimizer, unet_defaults.LEARNING_RATES["tiny"]), (vae_optimizer, 1e-4)):
            for group in current_optimizer.param_groups:
                group["lr"] = base_lr * group.get("lr_scale", 1.0) * (0.5 + 0.5 * np.cos(np.pi * fraction))
        indices, mirrored = np.random.default_rng(images_seen).integers(len(labels), size=16), images_seen // 16 % 2
        images = to_float(torch.from_numpy(pixels["train"].values[indices]))
        images = images.flip(-1) if mirrored else images
        target_features = torch.from_numpy(features[indices][:, mirrored])
        noise, timesteps = torch.randn(16, *latent_shape(vae, size_px)), torch.randint(1000, (16,))
        batch_labels, crop_parameters = labels[indices], torch.zeros(16, 0)
        with autocast(precision, "cpu"):
            posterior_noise = torch.randn_like(noise)
            reconstructions, latent_mean, logvar, _ = vae_model(images, posterior_noise)
            loss = F.l1_loss(reconstructions, images) + perceptual_weight * perceptual(reconstructions, images)
            latents = latent_mean + (0.5 * logvar).exp() * posterior_noise
            latents = F.batch_norm(latents.float(), None, None, training=True)
            model.requires_grad_(False)
            _, predicted_features = model(
                scheduler.add_noise(latents, noise, timesteps), timesteps, batch_labels, crop_parameters
            )
            model.requires_grad_(True)
        kl = kl_divergence(latent_mean, logvar).mean()
        (
            loss
            + kl_weight * kl
            + VAE_ALIGN_WEIGHT * alignment_loss(predicted_features, target_features, mean, std).mean()
        ).backward()
        vae_optimizer.step()
        vae_optimizer.zero_grad()
        latents = latents.detach()
        with autocast(precision, "cpu"):
            model_pred, predicted_features = model(
                scheduler.add_noise(latents, noise, timesteps), timesteps, batch_labels, crop_parameters
            )
        loss = denoising_loss(model_pred, prediction_target(scheduler, latents, noise, timesteps))
        loss = (min_snr_weight(scheduler, timesteps, unet_defaults.min_snr_gamma) * loss).mean()
        alignment = alignment_loss(predicted_features, target_features, mean, std).mean()
        (loss + unet_defaults.align_weight * alignment).backward()
        optimizer.step()
        optimizer.zero_grad()
        images_seen += 16
        if images_seen % 800 == 0:
            print(
                f"{images_seen} photos: alignment {1 - float(alignment):.3f}, KL {float(kl):.0f} nats", file=sys.stderr
            )
    vae.eval()
    latent_mean, latent_std, _ = measure_latents(cache_moments(vae, pixels["train"], CPU))
    vae.register_to_config(latents_mean=latent_mean, latents_std=latent_std)
    vae.save_pretrained(folder)
    return images_seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--vae-checkpoint", type=Path, required=True, help="the --output-dir of train_vae.py")
    parser.add_argument("--output-dir", type=Path, default=Path("end_to_end"))
    parser.add_argument("--tune-minutes", type=float, default=2)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--num-images", type=int, default=300)
    args = parser.parse_args()
    args.data_dir, args.vae_checkpoint, args.output_dir = (
        p.resolve() for p in (args.data_dir, args.vae_checkpoint, args.output_dir)
    )
    tuned_vae = args.output_dir / "vae"
    images_seen = tune(args, tuned_vae)
    print(f"{machine_name('cpu')}; {images_seen} photos in {args.tune_minutes:g} minutes of tuning\n")
    print(
        "| VAE | PSNR (dB) | its KID x1000 [95 %] | KID x1000 [95 %] | precision | recall |\n|---|---|---|---|---|---|"
    )
    rows = [("as it was", args.vae_checkpoint, args.minutes), ("tuned through the alignment", tuned_vae, args.minutes)]
    rows.append(("as it was, and the minutes of tuning as well", args.vae_checkpoint, args.minutes + args.tune_minutes))
    for name, vae, minutes in rows:
        run = args.output_dir / name.replace(" ", "-")
        flags = ["--data-dir", args.data_dir, "--output-dir", run]
        run_script(
            ROOT / "train_unet.py",
            *flags,
            "--config",
            "tiny",
            "--vae-checkpoint",
            vae,
            "--max-train-minutes",
            minutes,
            *QUIET,
        )
        run_command("evaluate", *flags, "--pipeline", run, "--num-images", args.num_images, "--against", "validation")
        results = json.loads((run / "evaluation.json").read_text())
        reconstruction, generation = results["reconstruction"], results["generation"]
        cells = (
            f"{reconstruction['psnr_db']:.2f} | {with_interval(reconstruction)} "
            f"| {with_interval(generation)} | {generation['precision']:.2f} | {generation['recall']:.2f}"
        )
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
