"""What do samples lose in the UNet, and what does a decoder gain that has seen the latents that the UNet draws?

python benchmarks/drawn_latents.py --pipeline diffusion_models --data-dir training_data/corel/corel_all

A VAE learns to decode the latents of photos. The latents that a UNet draws are different: their fine detail is averaged
away. The script measures this in two steps.

1. KID by noise level. Noise is added to the latents of the training photos up to a level, and the UNet removes it. The
   decoded images are compared with the validation photos. At level 0 these are the VAE's reconstructions, and at
   level 1 the samples.
2. A tuned decoder. `decoder` and `post_quant_conv` of the VAE are trained for --minutes on latents that the UNet has
   denoised, with the photo as the target (L1, perceptual and adversarial loss), and on free samples with the
   adversarial loss alone. Encoder, UNet and latents stay as they are, so the result is an AutoencoderKL for the same
   pipeline.

The perceptual loss and KID use the same network, which flatters the tuned decoder. Look at the images too. Run nothing
else at the same time. Writes drawn_latents.md and drawn_latents.png, which shows your photos' subjects: samples before
and after. Do not publish it if the photos are not yours.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from common import machine_name
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from corel_diffusers.data.latents import cache_moments, scale_latents
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels, to_float
from corel_diffusers.evaluation.features import extract, load_network
from corel_diffusers.evaluation.kid import kernel_distance
from corel_diffusers.files import write_text
from corel_diffusers.losses import vae as losses
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.models.discriminator import build_discriminator
from corel_diffusers.plots import image_grid, save_image
from pipeline import CorelPipeline

CPU, STEPS, GUIDANCE = torch.device("cpu"), 15, 2.5
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
TUNED_LEVELS = (0.2, 0.3, 0.4)  # the detail is lost here, and the photo still is the target
BATCH, PERCEPTUAL_WEIGHT, LEARNING_RATE, WARMUP_SECONDS = 8, 0.3, 1e-4, 10


@torch.no_grad()
def denoised(
    pipe: DiffusionPipeline, clean: torch.Tensor, labels: torch.Tensor, level: float, seed: int
) -> torch.Tensor:
    """Add noise to scaled latents (N, C, h, w) up to a level from 0 to 1, and let the UNet remove it."""
    scheduler, parts = pipe.scheduler, []
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    low, high = pipe.default_guidance_interval
    for latents, part_noise, part_labels in zip(clean.split(64), noise.split(64), labels.split(64), strict=True):
        scheduler.set_timesteps(STEPS)
        first = min(int((scheduler.timesteps > 1000 * level).sum()), STEPS - 1)
        scheduler.set_begin_index(first)
        latents = scheduler.add_noise(latents, part_noise, scheduler.timesteps[first].expand(len(latents)))
        for timestep in scheduler.timesteps[first:]:
            if low <= float(timestep) / 1000 <= high:
                model_pred = pipe.guided_prediction(latents, timestep, part_labels, GUIDANCE)
            else:
                model_pred = pipe.unet(latents, timestep, part_labels).sample
            latents = scheduler.step(model_pred, timestep, latents).prev_sample
        parts.append(latents)
    return torch.cat(parts)


def drawn(pipe: DiffusionPipeline, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the scaled latents of one free sample per label: (N, C, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    parts = [pipe(class_labels=part.tolist(), generator=generator, output_type="latent") for part in labels.split(64)]
    return torch.cat([part.images for part in parts])


def decoded(pipe: DiffusionPipeline, vae: AutoencoderKL, latents: torch.Tensor) -> np.ndarray:
    """Decode scaled latents with a VAE: uint8 (N, H, W, 3)."""
    pipe.register_modules(vae=vae)
    with torch.no_grad():
        return (255 * pipe.decode(latents, "np")).round().astype(np.uint8)


def tuned_decoder(
    vae: AutoencoderKL, photos: torch.Tensor, pairs: torch.Tensor, free: torch.Tensor, seconds: float, weight: float
) -> AutoencoderKL:
    """Return a copy of the VAE whose decoder was trained on latents that the UNet has drawn.

    Args:
        photos: (N, 3, H, W) in [-1, 1].
        pairs: (N, R, C, h, w), R denoised versions of the latents of each photo, scaled.
        free: (M, C, h, w), free samples, scaled.
        weight: of the adversarial loss, relative to the gradient of the other losses at the last layer.
    """
    vae = copy.deepcopy(vae).requires_grad_(False)
    parameters = [
        *vae.decoder.requires_grad_(True).parameters(),
        *vae.post_quant_conv.requires_grad_(True).parameters(),
    ]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    discriminator, perceptual, inputs = build_discriminator(), PerceptualLoss("efficientnet-lite0"), []
    its_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2 * LEARNING_RATE, betas=(0.5, 0.9))
    vae.decoder.conv_out.register_forward_pre_hook(lambda layer, given: inputs.append(given[0].detach()))
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        rows, versions = torch.randint(len(photos), (BATCH,)), torch.randint(pairs.shape[1], (BATCH,))
        latents = torch.cat([pairs[rows, versions], free[torch.randint(len(free), (BATCH,))]])
        images = vae.decode(latents * std / vae.config.scaling_factor + mean).sample
        target = photos[rows]
        loss = (images[:BATCH] - target).abs().mean() + PERCEPTUAL_WEIGHT * perceptual(images[:BATCH], target)
        if elapsed > WARMUP_SECONDS:  # the discriminator learns first
            adversarial = -discriminator.requires_grad_(False)(images).mean()
            discriminator.requires_grad_(True)
            _, loss = losses.add_adversarial_loss(loss, adversarial, weight, images, vae.decoder.conv_out, inputs[-1])
        inputs.clear()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * elapsed / seconds))
        optimizer.step()
        optimizer.zero_grad()

        real = photos[torch.randint(len(photos), (2 * BATCH,))]
        real = real.flip(3) if torch.rand(()) < 0.5 else real
        losses.discriminator_loss(discriminator(real), discriminator(images.detach())).backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    return vae.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--minutes", type=float, default=2, help="training of the decoder")
    parser.add_argument("--adversarial-weight", type=float, default=1.0)
    args = parser.parse_args()

    torch.manual_seed(0)
    saved = DiffusionPipeline.from_pretrained(args.pipeline, trust_remote_code=True)
    pipe = CorelPipeline(**saved.components, class_names=saved.config.class_names)
    pipe.set_progress_bar_config(disable=True)
    photos, pixels = cache_pixels(load_photos(args.data_dir), pipe.default_size)
    vae, network = pipe.vae, load_network("efficientnet-lite0", CPU)
    labels, held_out_labels = (torch.tensor(photos[split]["label"][:]) for split in ("train", "validation"))
    held_out = extract(network, pixels["validation"].values)
    moments = torch.from_numpy(np.asarray(cache_moments(vae, pixels["train"], CPU, batch_size=16)))
    clean = scale_latents(moments[:, 0].chunk(2, 1)[0], vae)

    def kid(vae: AutoencoderKL, latents: torch.Tensor) -> float:
        features = extract(network, decoded(pipe, vae, latents))
        return 1e3 * float(kernel_distance(features, held_out, labels_a=labels, labels_b=held_out_labels))

    samples = [drawn(pipe, labels, seed) for seed in (1, 2)]
    lines = ["| latents | KID x1000 |", "|---|---|", f"| of photos, not denoised | {kid(vae, clean):.1f} |"]
    lines += [
        f"| denoised from {level} | {kid(vae, denoised(pipe, clean, labels, level, 3)):.1f} |" for level in LEVELS
    ]
    lines += [f"| free samples, seed {seed} | {kid(vae, part):.1f} |" for seed, part in enumerate(samples, 1)]

    pairs = torch.stack([denoised(pipe, clean, labels, v, 10 + n) for n, v in enumerate((*TUNED_LEVELS,) * 2)], 1)
    free = torch.cat([drawn(pipe, labels, seed) for seed in (20, 21)])
    real = to_float(torch.from_numpy(np.asarray(pixels["train"].values)))
    tuned = tuned_decoder(vae, real, pairs, free, 60 * args.minutes, args.adversarial_weight)
    lines.append(f"| of photos, tuned decoder | {kid(tuned, clean):.1f} |")
    lines += [
        f"| free samples, seed {seed}, tuned decoder | {kid(tuned, part):.1f} |" for seed, part in enumerate(samples, 1)
    ]
    shown = samples[0][:: len(labels) // 24][:24]  # the photos are sorted by class
    rows = [decoded(pipe, model, part) for part in shown.split(12) for model in (vae, tuned)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_image(
        image_grid([Image.fromarray(image) for image in np.concatenate(rows)], 12),
        args.output_dir / "drawn_latents.png",
    )
    settings = f"{len(clean)} photos, {args.minutes:g} minutes, adversarial weight {args.adversarial_weight:g}"
    write_text(args.output_dir / "drawn_latents.md", "\n".join([f"{settings}, {machine_name()}", "", *lines, ""]))
    print((args.output_dir / "drawn_latents.md").read_text())


if __name__ == "__main__":
    main()
