"""What a bug report needs: `corel-diffusers env`."""

import importlib.metadata
import platform

from corel_diffusers import __version__
from corel_diffusers.config.checks import cache_home

PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "transformers", "huggingface_hub", "safetensors", "pillow",
            "pillow-heif", "numpy", "tyro", "tensorboard", "wandb", "gradio")  # fmt: skip


def environment() -> str:
    """Return the versions of the system and of the packages, the devices, and the place of the caches, one per line."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows = {
        "corel_diffusers": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        **{name: installed_version(name) for name in PACKAGES},
        "CUDA of torch": torch.version.cuda or "none",
        "GPUs": ", ".join(gpus) or "none",
        "CPU threads": str(torch.get_num_threads()),
        "caches": str(cache_home()),
    }
    return "\n".join(f"{name}: {value}" for name, value in rows.items())


def installed_version(name: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
