"""The plain loops that the step benchmarks compare with: float32, NCHW, unfused AdamW, weights averaged one parameter after the other,
layers as diffusers has them, the perceptual loss's network as its package has it.

python benchmarks/plain.py vae PHOTOS TIMES --config tiny
python benchmarks/plain.py unet PHOTOS TIMES --config tiny --vae vae_models [--cached]
python benchmarks/plain.py ddpm PHOTOS TIMES --config tiny --vae vae_models

PHOTOS: a folder of PNG files, decoded and resized in the loader. TIMES: a JSON list, the moments at which steps ended. unet encodes each
batch unless --cached; ddpm is denoising-diffusion-pytorch's Unet and the step of its Trainer, on the same latents, with about as many
parameters as the config.
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
from corel_diffusers.models import build_unet, build_vae
from corel_diffusers.perceptual import EfficientNetLiteFeatures, PerceptualLoss, packaged_efficientnet

EMA_DECAY = 0.995
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Photos(Dataset):
    """Decoded anew each time, (3, H, W) in [-1, 1]."""

    def __init__(self, folder: Path, size_px: int) -> None:
        self.files, self.size_px = sorted(folder.glob("*.png")), size_px

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        photo = ImageOps.fit(Image.open(self.files[index]).convert("RGB"), (self.size_px, self.size_px), Image.Resampling.LANCZOS)
        values = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
        return values.flip(-1) if torch.rand(()) < 0.5 else values


def endless(loader: DataLoader) -> Iterator[torch.Tensor]:
    while True:
        yield from (batch.to(DEVICE) for batch in loader)


def average(shadow: torch.nn.Module, model: torch.nn.Module) -> None:
    for kept, now in zip(shadow.parameters(), model.parameters(), strict=True):
        kept.data.mul_(EMA_DECAY).add_(now.data, alpha=1 - EMA_DECAY)


def vae_step(args: argparse.Namespace, photos: Iterator[torch.Tensor]) -> Callable[[], None]:
    vae = AutoencoderKL.from_config(build_vae(args.config, (args.image_size, args.image_size)).config).to(DEVICE)
    shadow, perceptual = copy.deepcopy(vae), PerceptualLoss("efficientnet-lite0").to(DEVICE)
    perceptual.network = EfficientNetLiteFeatures(packaged_efficientnet()).requires_grad_(False).to(DEVICE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, foreach=False, fused=False)

    def step() -> None:
        batch = next(photos)
        posterior = vae.encode(batch).latent_dist
        made = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(made, batch) + 0.3 * perceptual(made, batch) + 1e-4 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average(shadow, vae)

    return step


def latents_of(args: argparse.Namespace, photos: Iterator[torch.Tensor]) -> tuple[AutoencoderKL, Iterator[torch.Tensor]]:
    """Encoded anew each time, or, where they are cached, once."""
    vae = AutoencoderKL.from_pretrained(args.vae).eval().to(DEVICE)

    @torch.no_grad()
    def encode(batch: torch.Tensor) -> torch.Tensor:
        return vae.encode(batch).latent_dist.sample() * vae.config.scaling_factor

    if not args.cached:
        return vae, map(encode, photos)
    return vae, itertools.cycle([encode(next(photos)) for _ in range(8)])


def built_unet(args: argparse.Namespace, vae: AutoencoderKL) -> UNet2DModel:
    return UNet2DModel.from_config(build_unet(args.config, (args.image_size, args.image_size), vae, 6).config).to(DEVICE)


def unet_step(args: argparse.Namespace, photos: Iterator[torch.Tensor]) -> Callable[[], None]:
    vae, latents = latents_of(args, photos)
    unet = built_unet(args, vae)
    shadow, scheduler = copy.deepcopy(unet), DDPMScheduler(prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, foreach=False, fused=False)

    def step() -> None:
        clean = next(latents)
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (len(clean),), device=DEVICE)
        labels = torch.randint(7, (len(clean),), device=DEVICE)
        made = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, labels).sample
        F.mse_loss(made, scheduler.get_velocity(clean, noise, timesteps)).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average(shadow, unet)

    return step


def ddpm_step(args: argparse.Namespace, photos: Iterator[torch.Tensor]) -> Callable[[], None]:
    stand_in_for_torchvision()
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    args.cached = True
    vae, latents = latents_of(args, photos)
    ours = built_unet(args, vae)
    mults = (1, 2, 4, 8)[: len(ours.config.block_out_channels)]
    wanted = sum(p.numel() for p in ours.parameters())

    def built(dim: int) -> torch.nn.Module:
        return Unet(dim=dim, dim_mults=mults, channels=vae.config.latent_channels)

    nearest = min(range(8, 129, 8), key=lambda dim: abs(sum(p.numel() for p in built(dim).parameters()) - wanted))
    diffusion = GaussianDiffusion(built(nearest), image_size=ours.config.sample_size, auto_normalize=False).to(DEVICE)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))  # as its Trainer has it
    ema = EMA(diffusion, beta=EMA_DECAY, update_every=10)

    def step() -> None:
        diffusion(next(latents)).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    print(
        f"denoising-diffusion-pytorch: dim {nearest}, {sum(p.numel() for p in diffusion.parameters()) / 1e6:.1f} M parameters",
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
