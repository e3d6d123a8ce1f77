"""Train a latent diffusion model from scratch on your own photos: VAE, UNet, pipeline, Hub.

Example:
    >>> import corel_diffusers as cd
    >>> run = cd.train("photos", minutes=60)
    >>> run.pipeline("sunset").images[0].save("sunset.png")
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["build_unet", "build_vae", "evaluate", "generate", "load_photos", "prepare", "push", "train"]

if TYPE_CHECKING:
    from corel_diffusers.api import build_unet, build_vae, evaluate, generate, load_photos, prepare, push, train


def __getattr__(name: str) -> object:
    """Import a function of the Python API when it is first used: the command line must not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from corel_diffusers import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
