"""Plain training loops that the step benchmarks compare the toolkit with.

They use float32, NCHW, unfused AdamW, an average of the weights that is updated one parameter at a time, the layers of
diffusers, and the perceptual loss's network as its package builds it.

python benchmarks/plain.py vae PHOTOS TIMES --config tiny
python benchmarks/plain.py unet PHOTOS TIMES --config tiny --vae vae_models [--cached]
python benchmarks/plain.py ddpm PHOTOS TIMES --config tiny --vae vae_models

PHOTOS is a folder of PNG files. The data loader decodes and resizes them. The script writes TIMES, a JSON list of the
times at which the steps ended. `unet` encodes each batch, unless --cached is given. `ddpm` is
denoising-diffusion-pytorch's Unet with the training step of its Trainer, on the same latents. It has about as many
parameters as the UNet of --config.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from peers import stand_in_for_torchvision
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from corel_diffusers.files import write_json
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.models.efficientnet import EfficientNetLiteFeatures, load_packaged_efficientnet
from corel_diffusers.models.unet import build_unet
from corel_diffusers.models.vae import build_vae

EMA_DECAY = 0.995
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Photos(Dataset):
    """Photos that are decoded at each access: (3, H, W) in [-1, 1]."""

    def __init__(self, folder: Path, size_px: int) -> None:
        self.files, self.size_px = sorted(folder.glob("*.png")), size_px

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        photo = ImageOps.fit(
            Image.open(self.files[index]).convert("RGB"), (self.size_px, self.size_px), Image.Resampling.LANCZOS
        )
        values = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
        return values.flip(-1) if torch.rand(()) < 0.5 else values


def endless(loader: DataLoader) -> Iterator[torch.Tensor]:
    """Yield the batches of a loader on the device, epoch after epoch."""
    while True:
        yield from (batch.to(DEVICE) for batch in loader)


def update_ema(ema: torch.nn.Module, model: torch.nn.Module) -> None:
    """Update the averaged weights, one parameter at a time."""
    for ema_weight, weight in zip(ema.parameters(), model.parameters(), strict=True):
        ema_weight.data.mul_(EMA_DECAY).add_(weight.data, alpha=1 - EMA_DECAY)


def vae_step(args: argparse.Namespace, photos: Iterator[torch.Tensor]) -> Callable[[], None]:
    """Build a VAE and return a function that runs one training step."""
    vae = AutoencoderKL.from_config(build_vae(args.config, (args.image_size, args.image_size)).config).to(DEVICE)
    ema, perceptual = copy.deepcopy(vae), PerceptualLoss("efficientnet-lite0").to(DEVICE)
    perceptual.network = EfficientNetLiteFeatures(load_packaged_efficientnet()).requires_grad_(False).to(DEVICE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, foreach=False, fused=False)

    def step() -> None:
        images = next(photos)
        posterior = vae.encode(images).latent_dist
        reconstructions = vae.decode(posterior.sample()).sample
        loss = (
            F.l1_loss(reconstructions, images)
            + 0.3 * perceptual(reconstructions, images)
            + 1e-4 * posterior.kl().mean()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, vae)

    return step


def latent_batches(
    args: argparse.Namespace, photos: Iterator[torch.Tensor]
) -> tuple[AutoencoderKL, Iterator[torch.Tensor]]:
    """Return the VAE and its latents of the photos. With --cached, eight batches are encoded once and repeated."""
    vae = AutoencoderKL.from_pretrained(args.vae).eval().to(DEVICE)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        return vae.encode(images).latent_dist.sample() * vae.config.scaling_factor

    if not args.cached:
        return vae, map(encode, photos)
    return vae, itertools.cycle([encode(next(photos)) for _ in range(8)])


def plain_unet(args: argparse.Namespace, vae: AutoencoderKL) -> UNet2DModel:
    """Build the UNet of --config with the layers of diffusers."""
    return UNet2DModel.from_config(build_unet(args.config, (args.image_size, args.image_size), vae, 6).config).to(
        DEVICE
    )


def unet_step(args: argparse.Namespace, photos: Iterator[torch.Tensor]) -> Callable[[], None]:
    """Build a UNet and return a function that runs one training step."""
    vae, latents = latent_batches(args, photos)
    unet = plain_unet(args, vae)
    ema, scheduler = copy.deepcopy(unet), DDPMScheduler(prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, foreach=False, fused=False)

    def step() -> None:
        batch = next(latents)
        noise, timesteps = torch.randn_like(batch), torch.randint(1000, (len(batch),), device=DEVICE)
        labels = torch.randint(7, (len(batch),), device=DEVICE)
        model_pred = unet(scheduler.add_noise(batch, noise, timesteps), timesteps, labels).sample
        F.mse_loss(model_pred, scheduler.get_velocity(batch, noise, timesteps)).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, unet)

    return step


def ddpm_step(args: argparse.Namespace, photos: Iterator[torch.Tensor]) -> Callable[[], None]:
    """Build denoising-diffusion-pytorch's Unet and return a function that runs one training step."""
    stand_in_for_torchvision()
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    args.cached = True
    vae, latents = latent_batches(args, photos)
    toolkit_unet = plain_unet(args, vae)
    dim_mults = (1, 2, 4, 8)[: len(toolkit_unet.config.block_out_channels)]
    target_parameters = sum(p.numel() for p in toolkit_unet.parameters())

    def build(dim: int) -> torch.nn.Module:
        return Unet(dim=dim, dim_mults=dim_mults, channels=vae.config.latent_channels)

    nearest_dim = min(
        range(8, 129, 8), key=lambda dim: abs(sum(p.numel() for p in build(dim).parameters()) - target_parameters)
    )
    diffusion = GaussianDiffusion(
        build(nearest_dim), image_size=toolkit_unet.config.sample_size, auto_normalize=False
    ).to(DEVICE)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))  # the settings of its Trainer
    ema = EMA(diffusion, beta=EMA_DECAY, update_every=10)

    def step() -> None:
        diffusion(next(latents)).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    print(
        f"denoising-diffusion-pytorch: dim {nearest_dim}, "
        f"{sum(p.numel() for p in diffusion.parameters()) / 1e6:.1f} M parameters",
        file=sys.stderr,
    )
    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["vae", "unet", "ddpm"])
    parser.add_argument("photos", type=Path)
    parser.add_argument("times", type=Path)
    parser.add_argument("--config", required=True, help="tiny, base, large or a JSON file")
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    loader = DataLoader(Photos(args.photos, args.image_size), args.batch_size, shuffle=True, drop_last=True)
    step = {"vae": vae_step, "unet": unet_step, "ddpm": ddpm_step}[args.kind](args, endless(loader))
    times = []
    for _ in range(args.steps):
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic())
    write_json(args.times, times)
