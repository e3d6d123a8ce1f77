"""`corel-diffusers tune-decoder`: train the decoder of a pipeline on the latents that its UNet draws.

A VAE learns to decode the latents of photos. The latents that a UNet draws are different: their fine detail is averaged
away, and the decoder shows them blurred. Here the decoder learns to decode such latents. The encoder, the UNet and the
scale of the latents do not change, so the result is an AutoencoderKL for the same pipeline.
"""

import math
import time
from itertools import count
from typing import NamedTuple

import torch
from datasets import DatasetDict
from diffusers import DiffusionPipeline
from torch.nn import functional as F
from tqdm import tqdm

from corel_diffusers.config.commands import TuneDecoder
from corel_diffusers.data.latents import scale_latents, unscale_latents
from corel_diffusers.data.pixels import Pixels, cache_pixels
from corel_diffusers.evaluation.inputs import photos_of_model
from corel_diffusers.files import UserError, write_json
from corel_diffusers.hub.cards import write_card
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.losses.vae import add_adversarial_loss, discriminator_loss
from corel_diffusers.models.discriminator import build_discriminator
from corel_diffusers.models.vae import VAEWithPosterior, decode_latents, encode_photos
from corel_diffusers.plots import save_image
from corel_diffusers.runtime.precision import autocast, resolve_precision
from corel_diffusers.sampling import previews
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device
from corel_diffusers.sampling.samplers import AUTO, build_sampler
from corel_diffusers.saved_models import DECODER_TUNING, atomic_model_save, crc32_of
from corel_diffusers.training.run_lock import locked
from pipeline import CorelPipeline

# Noise levels from which the UNet denoises the latents of photos, from 0 (clean) to 1 (pure noise). At these levels the
# fine detail is lost, but the result still shows the photo (benchmarks/results/drawn_latents.md).
LEVELS = (0.2, 0.3, 0.4)
GUIDANCE_SCALE = 2.5  # the default of the pipeline
DRAWN_AT_ONCE = 64
DRAWING_FRACTION = 0.25  # of the minutes, in which the UNet draws
WARMUP_FRACTION = 0.1  # of the training, in which only the discriminator learns from the drawn images
BATCH_SIZE = 8  # of denoised latents, and of free samples
PERCEPTUAL_WEIGHT, ADVERSARIAL_WEIGHT = 0.3, 1.0
LEARNING_RATE, DISCRIMINATOR_LEARNING_RATE = 1e-4, 2e-4


class DrawnLatents(NamedTuple):
    """Scaled latents that the UNet has drawn."""

    photos: torch.Tensor  # (N,), the photo of each denoised latent
    denoised: torch.Tensor  # (N, C, h, w)
    free: torch.Tensor  # (M, C, h, w), free samples: they have no photo


def tune_decoder(args: TuneDecoder) -> None:
    """Tune the decoder of a pipeline for `args.minutes`, and save the pipeline in its folder in one piece.

    Nothing is written before the end.

    Raises:
        UserError: the pipeline or the photos cannot be used.
    """
    began, device, folder = time.monotonic(), pick_device(args.device), args.folder
    precision = resolve_precision(args.mixed_precision, device.type)
    precision = "no" if precision == "fp16" else precision  # the gradients would underflow without a scaler
    with locked(folder, is_writer=True):
        torch.manual_seed(args.seed)
        pipe = current_pipeline(load_pipeline(folder, device, trust_remote_code=args.trust_remote_code))
        photos = DatasetDict(train=photos_of_model(args.photo_source, pipe, folder)["train"])
        photos, pixels = cache_pixels(photos, pipe.default_size, grey=pipe.vae.config.in_channels == 1)
        steps = tune(pipe, pixels["train"], class_names_of(photos), 60 * args.minutes, began, precision)
        tuning = {"minutes": args.minutes, "steps": steps, "photos": len(photos["train"])}
        with atomic_model_save(folder) as staged:
            pipe.save_pretrained(staged)
            vae_crc32 = crc32_of(staged / "vae" / "diffusion_pytorch_model.safetensors")
            write_json(staged / DECODER_TUNING, tuning | {"vae_crc32": vae_crc32})
        save_image(previews.sample_grid(pipe, args.seed, num_samples=36), folder / "grid.png")
        write_card(folder)
    print(f"{folder} has a decoder that was tuned for {steps} steps on latents of its UNet")


def current_pipeline(saved: DiffusionPipeline) -> CorelPipeline:
    """Return the pipeline with the recommended sampler. The pipeline of an older version may have another class."""
    configs = ("class_names", "class_numbers", "image_sizes")
    components = saved.components | {"scheduler": build_sampler(AUTO, saved.scheduler)}
    pipe = CorelPipeline(**components, **{name: saved.config[name] for name in configs if name in saved.config})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def class_names_of(photos: DatasetDict) -> list[str]:
    """Return the name of the class of each training photo."""
    train = photos["train"]
    return train.features["label"].int2str(train["label"][:])


def tune(
    pipe: CorelPipeline, pixels: Pixels, class_names: list[str], seconds: float, began: float, precision: str
) -> int:
    """Train the decoder of the pipeline's VAE until `seconds` after `began`. Return the number of steps.

    Args:
        pixels: the training photos, all in the default size of the pipeline.
        class_names: the name of the class of each photo.
        began: time.monotonic() at the start of the command.
        precision: "bf16" or "no".

    Raises:
        UserError: the minutes were over before the first step of the training.
    """
    drawing_ends = time.monotonic() + DRAWING_FRACTION * (began + seconds - time.monotonic())
    drawn = draw_latents(pipe, pixels, class_names, drawing_ends)
    vae, device = pipe.vae.requires_grad_(False), pipe.device
    model = VAEWithPosterior(vae, adversarial=True)
    decoder = [part.requires_grad_(True) for part in (vae.decoder, vae.post_quant_conv) if part is not None]
    parameters = [parameter for part in decoder for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    discriminator = build_discriminator().to(device)
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=DISCRIMINATOR_LEARNING_RATE, betas=(0.5, 0.9), fused=True
    )
    perceptual = PerceptualLoss("efficientnet-lite0").to(device, memory_format=torch.channels_last)
    training_began = time.monotonic()
    training_seconds, steps = began + seconds - training_began, 0
    if training_seconds <= 0:
        raise UserError(f"--minutes {seconds / 60:g}: the UNet drew until the minutes were over: give more")

    with tqdm(total=round(training_seconds), desc="tuning the decoder", unit="s", leave=False) as bar:
        while (elapsed := time.monotonic() - training_began) < training_seconds:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * elapsed / training_seconds)) / 2
            pairs = torch.randint(len(drawn.photos), (BATCH_SIZE,))
            latents = torch.cat([drawn.denoised[pairs], drawn.free[torch.randint(len(drawn.free), (BATCH_SIZE,))]])
            photos = pixels.batch(drawn.photos[pairs].numpy()).to(device)  # what the denoised latents should become
            with autocast(precision, device.type):
                images = decode_latents(vae, unscale_latents(latents, vae)).float()  # (2B, 3, H, W)
                adversarial = -discriminator.requires_grad_(False)(images).float().mean()
            loss = F.l1_loss(images[:BATCH_SIZE], photos) + PERCEPTUAL_WEIGHT * perceptual(images[:BATCH_SIZE], photos)
            weight = ADVERSARIAL_WEIGHT if elapsed > WARMUP_FRACTION * training_seconds else 0.0
            _, loss = add_adversarial_loss(
                loss, adversarial, weight, images, vae.decoder.conv_out, model.drawn_from.float()
            )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if norm.isfinite():
                optimizer.step()
            optimizer.zero_grad()

            discriminator.requires_grad_(True)
            real = pixels.batch(torch.randint(len(pixels), (2 * BATCH_SIZE,)).numpy()).to(device)
            real = real.flip(3) if torch.rand(()) < 0.5 else real
            with autocast(precision, device.type):
                logits = discriminator(torch.cat([real, images.detach()])).float()
            discriminator_loss(*logits.chunk(2)).backward()
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
            steps += 1
            bar.n = min(round(elapsed), bar.total)
            bar.refresh()
    vae.requires_grad_(False)
    return steps


@torch.no_grad()
def draw_latents(pipe: CorelPipeline, pixels: Pixels, class_names: list[str], ends: float) -> DrawnLatents:
    """Let the UNet draw until the time `ends`, and for each of LEVELS at least once.

    It denoises the noised latents of photos, and it draws free samples of the classes of these photos.
    """
    photos, denoised, free = [], [], []
    for number in count():
        if number >= len(LEVELS) and time.monotonic() > ends:
            return DrawnLatents(torch.cat(photos), torch.cat(denoised), torch.cat(free))
        rows = torch.randperm(len(pixels))[:DRAWN_AT_ONCE]
        names = None
        if pipe.config.class_names:
            known = set(pipe.config.class_names.values())
            names = [class_names[row] if class_names[row] in known else None for row in rows]
        clean = encode_photos(pipe.vae, pixels.batch(rows.numpy()).to(pipe.device)).mean
        photos.append(rows)
        denoised.append(denoise_from(pipe, scale_latents(clean, pipe.vae), names, LEVELS[number % len(LEVELS)]))
        free.append(pipe(len(rows), names, output_type="latent").images)


def denoise_from(
    pipe: CorelPipeline, clean: torch.Tensor, class_names: list[str | None] | None, level: float
) -> torch.Tensor:
    """Add noise to scaled latents (N, C, h, w) up to a noise level, and let the pipeline remove it: (N, C, h, w)."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(pipe.default_steps, device=pipe.device)
    first = int((scheduler.timesteps > level * scheduler.config.num_train_timesteps).sum())
    # the rest of the schedule, as if it began here
    scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[first:], scheduler.sigmas[first:]
    start = scheduler.timesteps[:1].expand(len(clean))
    noised = scheduler.add_noise(clean, torch.randn_like(clean), start)
    labels = pipe.label_ids(len(clean), class_names)
    return pipe.denoise(noised, labels, GUIDANCE_SCALE, pipe.default_guidance_interval, {}, None)
