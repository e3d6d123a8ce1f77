"""Begin a run with the weights of a trained model (--init-from) instead of random ones."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import nn

from corel_diffusers.data.latents import weights_key
from corel_diffusers.files import UserError
from corel_diffusers.models.reading import read_pipeline, read_vae

MIN_FITTING = 0.8  # fraction of the weights; another number of classes or channels changes only a few
CLASS_EMBEDDING = "class_embedding.weight"


def load_initial_vae(vae: AutoencoderKL, location: Path | str) -> str:
    """Copy the weights of a trained VAE into a new one, and return a line that says what was copied.

    Args:
        vae: the new VAE, changed in place.
        location: the folder or the Hub id of an AutoencoderKL, or of a pipeline that has one.

    Raises:
        UserError: there is no VAE, or too few of its weights fit.
    """
    return copy_weights(vae, read_vae(location, "--init-from").state_dict(), location)


def load_initial_unet(unet: UNet2DModel, location: Path | str, class_names: list[str], vae: AutoencoderKL) -> str:
    """Copy the weights of a trained pipeline's UNet into a new UNet, and return a line that says what was copied.

    The embedding of a class is that of the trained class with the same name. A new class begins with the embedding of
    the null label.

    Args:
        unet: the new UNet, changed in place.
        location: the folder or the Hub id of a pipeline that train_unet.py wrote.
        class_names: the classes of the new UNet. Empty without classes.
        vae: the VAE of the new UNet.

    Raises:
        UserError: there is no such pipeline, its latents come from another VAE, or too few of its weights fit.
    """
    pipe = read_pipeline(location, "--init-from")
    if weights_key(pipe.vae) != weights_key(vae):
        raise UserError(
            f"--init-from {location}: its UNet was trained on the latents of another VAE: give --vae-checkpoint "
            f"{Path(location) / 'vae' if isinstance(location, Path) else 'the VAE of this pipeline'}"
        )
    weights = pipe.unet.state_dict()
    old_labels = {name: int(label) for label, name in (pipe.config.class_names or {}).items()}
    embedding, new = weights.get(CLASS_EMBEDDING), []
    if embedding is not None and class_names:
        new = [name for name in class_names if name not in old_labels]
        rows = [old_labels.get(name, len(old_labels)) for name in class_names]
        weights[CLASS_EMBEDDING] = embedding[[*rows, len(old_labels)]]  # the last row is the null label
    line = copy_weights(unet, weights, location)
    return f"{line}; new classes: {', '.join(new)}" if new else line


def copy_weights(model: nn.Module, weights: dict[str, torch.Tensor], location: Path | str) -> str:
    """Copy the weights that have the same name and shape. Return a line with their number.

    Raises:
        UserError: too few weights fit.
    """
    fitting, own = [], model.state_dict()
    for name, value in own.items():
        if name in weights and weights[name].shape == value.shape:
            value.copy_(weights[name])
            fitting.append(name)
    if len(fitting) < MIN_FITTING * len(own):
        raise UserError(
            f"--init-from {location}: only {len(fitting)} of {len(own)} weights fit: the model has another config, "
            "give it as --config (the path of its config.json)"
        )
    rest = f"; {len(own) - len(fitting)} do not fit and are random" if len(fitting) < len(own) else ""
    return f"--init-from {location}: {len(fitting)} of {len(own)} weights begin trained{rest}"
