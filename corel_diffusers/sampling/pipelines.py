"""Load a trained pipeline."""

import hashlib
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from corel_diffusers.config.checks import SIDES_PX, parse_size, require
from corel_diffusers.data.latents import check_vae_config, config_key, load_vae, scale_key, weights_key
from corel_diffusers.files import UserError, read_json
from corel_diffusers.models.configs import downsample_factor
from corel_diffusers.models.reading import read_pipeline


def sample_size_px(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Return the (height, width) of the samples of a pipeline, in pixels."""
    size, factor = pipe.unet.config.sample_size, downsample_factor(pipe.vae)
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def trained_sizes_px(pipe: DiffusionPipeline) -> list[tuple[int, int]]:
    """Return the image sizes (height, width) of a pipeline in pixels, the most frequent in training first."""
    names = getattr(pipe.config, "image_sizes", None)  # pipelines of earlier versions have one size
    return [tuple(map(int, name.split("x"))) for name in names] if names else [sample_size_px(pipe)]


def pick_device(name: str) -> torch.device:
    """Return the device of the flag --device. "auto" is cuda if there is a GPU, otherwise cpu.

    Raises:
        UserError: the device is unknown, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is no GPU here: give cpu or auto")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown: give auto, cuda or cpu") from None
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name} cannot be used here: give auto, cuda or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there are only {torch.cuda.device_count()} GPUs here: their numbers start at cuda:0"
        )
    return device


def load_pipeline(
    location: Path | str,
    device: torch.device,
    vae_location: Path | str | None = None,
    trust_remote_code: bool = False,
) -> DiffusionPipeline:
    """Load the pipeline from a folder or a Hub id. If `vae_location` is given, load the VAE from there instead.

    Args:
        trust_remote_code: see `read_pipeline`.

    Raises:
        UserError: the pipeline cannot be loaded, it is not a pipeline of train_unet.py, or the VAE does not fit.
    """
    pipe = read_pipeline(location, "--pipeline", trust_remote_code)
    if "class_names" not in pipe.config:
        raise UserError(f"--pipeline {location} is a {type(pipe).__name__}: give one that train_unet.py wrote")
    check_vae_config(pipe.vae, f"--pipeline {location}")
    size, factor = pipe.unet.config.sample_size, downsample_factor(pipe.vae)
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    are_usable = len(sides) == 2 and all(isinstance(side, int) and 0 < side * factor <= SIDES_PX[1] for side in sides)
    require(are_usable, "pipeline", location, f"the sample_size of its UNet cannot be used ({size}): repair it")
    for name in getattr(pipe.config, "image_sizes", None) or {}:
        parse_size(name, f"--pipeline {location}: the image size of its model_index.json")
    if vae_location:
        vae = load_vae(vae_location)
        if any(key(vae) != key(pipe.vae) for key in (weights_key, config_key, scale_key)):
            if vae.config.latent_channels != pipe.vae.config.latent_channels:
                raise UserError(
                    f"--vae-checkpoint {vae_location} has other latents than the pipeline's VAE: omit the flag"
                )
            print("notice: --vae-checkpoint is not the VAE that this UNet was trained with: the samples may be garbage")
            pipe.register_modules(vae=vae)
    return pipe.to(device)


def weights_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the weights of a pipeline: of its VAE, and of its UNet with the guide model if it has one.

    The card uses it to check that an evaluation was made with these weights.
    """
    parts = {"unet_sha256": ["unet", "guide"] if has_guide(folder) else ["unet"], "vae_sha256": ["vae"]}
    return {
        name: hashlib.sha256(
            b"".join((folder / part / "diffusion_pytorch_model.safetensors").read_bytes() for part in models)
        ).hexdigest()
        for name, models in parts.items()
    }


def has_guide(folder: Path) -> bool:
    """Return whether the pipeline has a guide model. An unused folder guide/ may be left from an earlier pipeline."""
    return read_json(folder / "model_index.json").get("guide", [None])[0] is not None
