"""Latents: the VAE encodes each version of a photo once; the posterior is cached, draws and scale come later.

The cache holds mean and log-variance before scaling. Its key stands for the VAE's weights and config, the photos, the size and the
arithmetic of the device: anything else is another cache.

The scale comes from the VAE's config alone, here for the trainer and in pipeline.py for sampling.
"""

import hashlib
import inspect
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from corel_diffusers.data.cache import ALONE, Shards, Share, digest
from corel_diffusers.data.transforms import Pixels
from corel_diffusers.data.views import Views, cache_versions, channel_statistics
from corel_diffusers.files import UserError, first_line


def load_vae(location: Path | str) -> AutoencoderKL:
    """A trained AutoencoderKL, from a folder or the Hub, frozen. Raises UserError where there is none that can be used."""
    trained_here = isinstance(location, Path) and (location / "metrics.jsonl").is_file()
    try:
        vae = AutoencoderKL.from_pretrained(location, local_files_only=isinstance(location, Path), use_safetensors=True)
    except Exception as error:  # diffusers and the Hub's client raise many kinds
        way_out = "train it first (train_vae.py), or give the --output-dir of a finished training or a Hub id"
        raise UserError(f"--vae-checkpoint {location}: no VAE can be loaded ({first_line(error)}): {way_out}") from None
    if trained_here and vae.config.latents_mean is None:
        raise UserError(f"--vae-checkpoint {location}: its training is not finished: go on with train_vae.py --resume latest")
    return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def weights_key(vae: AutoencoderKL) -> str:
    """Stands for a VAE's weights: SHA-256 over names and bytes."""
    key = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        key.update(name.encode())
        key.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:24]


def config_key(vae: AutoencoderKL) -> str:
    """Stands for what a VAE's config makes of its weights, as its activation and its norms' groups: not for the scale of its latents
    (`scale_key`), nor for what encoding and decoding do not look at."""
    apart = {"latents_mean", "latents_std", "scaling_factor", "shift_factor", "sample_size", "force_upcast"}
    values = {name: value for name, value in vae.config.items() if name not in apart and not name.startswith("_")}
    defaults = inspect.signature(AutoencoderKL.__init__).parameters
    told = {name: value for name, value in values.items() if name not in defaults or like_json(value) != like_json(defaults[name].default)}
    return digest(json.dumps(told, sort_keys=True))  # a fresh VAE's tuples are the lists of a loaded one


def like_json(value: object) -> object:
    """A tuple as the list that it becomes in a config file."""
    return list(value) if isinstance(value, tuple) else value


def scale_key(vae: AutoencoderKL) -> str:
    """Stands for the scale of a VAE's latents, as its config has it."""
    return digest(*(vae.config.get(name) for name in ("latents_mean", "latents_std", "scaling_factor", "shift_factor")))


def cache_moments(
    vae: AutoencoderKL,
    pixels: Pixels,
    device: torch.device,
    views: Views | None = None,
    batch_size: int = 32,
    share: Share = ALONE,
) -> Shards:
    """The posterior of each version of each photo, encoded once: cached, float32 (N, 2 + 2V, 2C, h, w).

    Second axis: photo, mirror image, then the views and their mirror images. Third: C means, then C log-variances.
    """

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pictures).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    return cache_versions(f"latents-{weights_key(vae)}-{config_key(vae)}", encode, pixels, views, device, batch_size, share)


def draw(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draws latents mean + exp(logvar / 2) * noise from cached posteriors.

    moments (B, 2C, h, w), noise (B, C, h, w) -> unscaled latents (B, C, h, w).
    """
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar) * noise


def scale(latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """VAE latents -> what the UNet sees: (z - latents_mean) / latents_std * scaling_factor per channel, from the config.

    A VAE without `latents_mean` (from elsewhere) gives (z - shift_factor) * scaling_factor, as diffusers' pipelines do.
    """
    config = vae.config
    if config.latents_mean is None:
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor
    mean, std = (per_channel(tuple(v), latents.dtype, latents.device) for v in (config.latents_mean, config.latents_std))
    return (latents - mean) / std * config.scaling_factor


@lru_cache(maxsize=8)
def per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(1, C, 1, 1), copied to the device once: each copy makes a GPU wait."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def measure_scale(moments: Shards) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over the training split, the posterior's spread included.

    moments: (N, 2, 2C, h, w). Var(z) = Var(mean) + E(exp(logvar)), the law of total variance.
    """
    channels = moments.shape[2] // 2
    mean, variance = channel_statistics(moments, slice(channels))
    spread, _ = channel_statistics(moments, slice(channels, None), np.exp)
    return mean.tolist(), np.sqrt(variance + spread).tolist()
