"""Latents: encode each version of a photo once, cache the posterior, and sample from it in each training step.

The cache holds the mean and the log-variance of the posterior before scaling. Its key identifies the weights and the
config of the VAE, the photos, their size and the arithmetic of the device. If one of them changes, another cache is
used.

The scale of the latents comes only from the VAE's config. This module applies it in training, pipeline.py in sampling.
"""

import hashlib
import inspect
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL

from corel_diffusers.config.checks import SIDES_PX
from corel_diffusers.data.augmented_crops import AugmentedCrops
from corel_diffusers.data.cache import SINGLE_PROCESS, Share, digest
from corel_diffusers.data.mixed_sizes import Array, MixedArray, parts_of
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.data.versions import cache_versions, channel_statistics, for_each_size
from corel_diffusers.files import UserError
from corel_diffusers.models.reading import read_vae
from corel_diffusers.models.vae import encode_photos
from corel_diffusers.runtime.precision import arithmetic


def load_vae(location: Path | str) -> AutoencoderKL:
    """Load a trained AutoencoderKL from a folder or from the Hub, and freeze it.

    Raises:
        UserError: the VAE is damaged or cannot be loaded, or its training is not finished.
    """
    vae = read_vae(location, "--vae-checkpoint")
    is_run_dir = isinstance(location, Path) and (location / "metrics.jsonl").is_file()
    if is_run_dir and vae.config.latents_mean is None:
        raise UserError(
            f"--vae-checkpoint {location}: its training is not finished: continue it with train_vae.py --resume latest"
        )
    check_vae_config(vae, f"--vae-checkpoint {location}")
    vae.register_to_config(_name_or_path="")  # the pipeline is published with this config: no path of this machine
    return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def check_vae_config(vae: AutoencoderKL, source: str) -> None:
    """Check the entries of a VAE's config that scale its latents and give its image size.

    Args:
        source: the flag and its value, for messages.

    Raises:
        UserError: an entry cannot be used.
    """
    config, channels = vae.config, vae.config.latent_channels
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
    are_sides = len(size) == 2 and all(isinstance(side, int) and 0 < side <= SIDES_PX[1] for side in size)
    entries = {"sample_size": are_sides, "scaling_factor": is_positive([config.scaling_factor], 1)}
    if config.latents_mean is not None or config.latents_std is not None:
        entries["latents_mean"] = are_finite(config.latents_mean, channels)
        entries["latents_std"] = is_positive(config.latents_std, channels)
    for name, is_usable in entries.items():
        if not is_usable:
            raise UserError(f"{source}: {name} in the config of the VAE cannot be used ({config[name]}): repair it")


def are_finite(values: object, count: int) -> bool:
    """Return whether a value of a config is a list of `count` finite numbers."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def is_positive(values: object, count: int) -> bool:
    """Return whether a value of a config is a list of `count` finite numbers above 0."""
    return are_finite(values, count) and min(values) > 0


def weights_key(vae: AutoencoderKL) -> str:
    """Return a key that identifies the weights of a VAE: the SHA-256 of their names and values."""
    sha256 = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()[:24]


def config_key(vae: AutoencoderKL) -> str:
    """Return a key that identifies the config entries that encoding and decoding use, such as the activation function.

    Other entries are excluded. The scale of the latents, for example, has its own key: see `scale_key`. Entries with
    diffusers' default are left out, so that a later version of diffusers with more entries gives the same key.
    """
    excluded = {"latents_mean", "latents_std", "scaling_factor", "shift_factor", "sample_size", "force_upcast"}
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(AutoencoderKL.__init__).parameters.items()
    }
    entries = {
        name: value
        for name, value in vae.config.items()
        if name not in excluded and not name.startswith("_") and as_json(value) != as_json(defaults.get(name, ...))
    }
    return digest(json.dumps(entries, sort_keys=True))


def as_json(value: object) -> object:
    """Return a tuple as a list, which it becomes in a config file."""
    return list(value) if isinstance(value, tuple) else value


def scale_key(vae: AutoencoderKL) -> str:
    """Return a key that identifies the scale of a VAE's latents in its config."""
    return digest(*(vae.config.get(name) for name in ("latents_mean", "latents_std", "scaling_factor", "shift_factor")))


def vae_keys(vae: AutoencoderKL) -> dict[str, str]:
    """Return what identifies the latents of a VAE on its device. The names are those of the settings of a run."""
    return {
        "vae": weights_key(vae),
        "vae_config": config_key(vae),
        "scale": scale_key(vae),
        "arithmetic": arithmetic(vae.device),
    }


def cache_moments(
    vae: AutoencoderKL,
    pixels: Pixels,
    device: torch.device,
    crops: AugmentedCrops | None = None,
    batch_size: int = 32,
    share: Share = SINGLE_PROCESS,
) -> Array | MixedArray:
    """Return the posterior of each version of each photo: encoded once, cached, float32 (N, 2 + 2V, 2C, h, w).

    The second axis holds the photo, its mirror image, then each augmented crop followed by its mirror image. The third
    axis holds C means, then C log-variances.
    """

    def encode(images: torch.Tensor) -> torch.Tensor:
        posterior = encode_photos(vae, images)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    key = f"latents-{weights_key(vae)}-{config_key(vae)}"
    return for_each_size(pixels, crops, lambda *part: cache_versions(key, encode, *part, device, batch_size, share))


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Sample unscaled latents from cached posteriors: mean + exp(logvar / 2) * noise, (B, C, h, w).

    Args:
        moments: (B, 2C, h, w), see `cache_moments`.
        noise: (B, C, h, w), standard normal.
    """
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar) * noise


def scale_latents(latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Return the latents z in the scale of the UNet: (z - latents_mean) / latents_std * scaling_factor per channel.

    These values are in the VAE's config. For a VAE without `latents_mean`, from another project, the result is
    (z - shift_factor) * scaling_factor, as in the pipelines of diffusers.
    """
    config = vae.config
    if config.latents_mean is None:
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor
    mean, std = (
        per_channel(tuple(values), latents.dtype, latents.device)
        for values in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) / std * config.scaling_factor


def unscale_latents(latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Return the latents in the scale of the VAE: the inverse of `scale_latents`."""
    config = vae.config
    if config.latents_mean is None:
        return latents / config.scaling_factor + (config.shift_factor or 0.0)
    mean, std = (
        per_channel(tuple(values), latents.dtype, latents.device)
        for values in (config.latents_mean, config.latents_std)
    )
    return latents / config.scaling_factor * std + mean


@lru_cache(maxsize=8)
def per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return one value per channel as (1, C, 1, 1). It is copied to the device only once: a GPU waits for each copy."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


class LatentStatistics(NamedTuple):
    """Statistics of latents that are sampled from posteriors: one value per channel."""

    mean: list[float]
    std: list[float]
    kl: list[float]  # mean KL divergence, in nats per latent value: 0 for a channel without information


def measure_latents(moments: Array | MixedArray) -> LatentStatistics:
    """Return the statistics of the latents of these posteriors.

    The law of total variance gives Var(z) = Var(mean) + E(exp(logvar)). The KL divergence of a posterior is
    (mean^2 + exp(logvar) - 1 - logvar) / 2 (Kingma & Welling 2014, appendix B).

    Args:
        moments: (N, V, 2C, h, w), see `cache_moments`.
    """
    channels = parts_of(moments)[0].shape[2] // 2
    mean, variance = channel_statistics(moments, slice(channels))
    posterior_variance, _ = channel_statistics(moments, slice(channels, None), np.exp)
    logvar, _ = channel_statistics(moments, slice(channels, None))
    std, kl = np.sqrt(variance + posterior_variance), (variance + mean**2 + posterior_variance - 1 - logvar) / 2
    return LatentStatistics(mean.tolist(), std.tolist(), kl.tolist())
