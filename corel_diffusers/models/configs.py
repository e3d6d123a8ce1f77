"""Model configs: presets as diffusers JSON beside this file, or a user's own JSON."""

import inspect
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import nn

from corel_diffusers.files import UserError, first_line, read_json
from corel_diffusers.models.layers import use_fast_layers

CONFIG_DIR = Path(__file__).parent
MAX_LAYERS_PER_BLOCK = 64


def load_config(kind: str, config: str) -> dict:
    """Return the config of a preset (`tiny`, `base`, `large`) or of a JSON file, without entries that start with "_".

    Args:
        kind: "vae" or "unet".

    Raises:
        UserError: the file does not contain a JSON object, it is the config of another model class or has entries that
            this class does not know, or its number of layers or stages cannot be used.
    """
    path = Path(config) if config.endswith(".json") else CONFIG_DIR / f"{kind}-{config}.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected one JSON object, as in a diffusers config.json")
    model_class = {"vae": AutoencoderKL, "unet": UNet2DModel}[kind]
    name = model_class.__name__
    if values.get("_class_name", name) != name:
        raise UserError(f"--config {path} is the config of {values['_class_name']}: give one of {name}")
    check_layers(values, f"--config {path}")
    channels = values.get("block_out_channels", [64])
    if not isinstance(channels, list) or not channels:
        raise UserError(f"--config {path}: block_out_channels must be a list with the channels of each stage")
    values = {entry: value for entry, value in values.items() if not entry.startswith("_")}
    if path.parent != CONFIG_DIR and (unknown := set(values) - set(inspect.signature(model_class).parameters)):
        raise UserError(
            f"--config {path}: {name} of this diffusers has no {', '.join(sorted(unknown))}: "
            f"remove it, or begin with a copy of {CONFIG_DIR / f'{kind}-tiny.json'}"
        )
    return values


def check_layers(values: dict, source: str) -> None:
    """Check the number of layers per stage of a config.

    diffusers builds the layers one by one, before it reads the weights. A huge number would fill the memory.

    Args:
        values: the config of a VAE or a UNet.
        source: the flag and its value, for messages.

    Raises:
        UserError: the number cannot be used.
    """
    layers = values.get("layers_per_block", 1)
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS_PER_BLOCK:
        raise UserError(f"{source}: layers_per_block must be a number from 1 to {MAX_LAYERS_PER_BLOCK}, not {layers}")


def from_config(model_class: type, values: dict, config: str, attention: str = "fused") -> nn.Module:
    """Return a new model with random weights and with the layers of layers.py.

    Args:
        attention: see `use_fast_layers`.

    Raises:
        UserError: `model_class` does not accept the values. The message names `config`.
    """
    try:
        model = model_class.from_config(values).to(memory_format=torch.channels_last)
    except Exception as error:  # a value that diffusers does not check can raise any type
        raise UserError(
            f"--config {config} is not a valid config of {model_class.__name__}: {first_line(error)}"
        ) from None
    use_fast_layers(model, attention)
    # This adds the class name and the version to the config, as the first save would do. Compiled code checks the
    # config, so it must not change later.
    model.to_json_string()
    return model


def downsample_factor(vae: AutoencoderKL) -> int:
    """Return the number of pixels per latent position in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, size_px: tuple[int, int]) -> tuple[int, int, int]:
    """Return the (C, h, w) of the latents of a photo of this size."""
    return (vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))


def trained_size_px(vae: AutoencoderKL) -> tuple[int, int]:
    """Return the image size (height, width) that the VAE was trained at."""
    size = vae.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def check_size(size_px: tuple[int, int], multiple: int, model_name: str) -> None:
    """Check that both sides are multiples of `multiple`.

    Raises:
        UserError: they are not. The message names the model and the nearest valid sizes.
    """
    if any(side % multiple for side in size_px):

        def format_size(sides: list[int]) -> str:
            return str(sides[0]) if sides[0] == sides[1] else "x".join(map(str, sides))

        smaller = [max(side // multiple, 1) * multiple for side in size_px]
        larger = [-(-side // multiple) * multiple for side in size_px]
        nearest = " or ".join(dict.fromkeys((format_size(smaller), format_size(larger))))
        raise UserError(
            f"--image-size {format_size(list(size_px))}: "
            f"{model_name} can take multiples of {multiple} px: give {nearest}"
        )


def parameter_count(model: nn.Module) -> str:
    """Return the number of parameters as text, such as "12.3 M parameters"."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
