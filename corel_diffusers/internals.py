"""Uses of private parts of torch, accelerate, datasets and Pillow, which a new version may change without notice.

All functions were tested with torch 2.6 and 2.13, diffusers 0.36 and 0.42, accelerate 1.10 and 1.15, and datasets 4.0
and 5.2. tests/test_internals.py has one test for each of them. If it fails after an upgrade, it says what changed.
"""

import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from PIL import Image
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.utils import _pytree


def has_bf16_in_hardware() -> bool:
    """Return whether the CPU computes matrix products in bfloat16. torch has no public function for this."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_class(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Give a module another class with the same weights and attributes, such as a subclass with a faster forward."""
    module.__class__ = module_class


def undo_compile(module: nn.Module) -> None:
    """Undo `module.compile()`. torch can only set this attribute."""
    module._compiled_call_impl = None


def undo_graph_capture(forward: object) -> None:
    """Undo `torch.cuda.make_graphed_callables`. It replaces the method `forward` of a module in place."""
    vars(forward).pop("forward", None)


def tensors_in(outputs: object) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


class FastAutocast(AutocastKwargs):
    """AutocastKwargs with a fast `to_kwargs`. accelerate's own copies the environment in each call: 0.7 ms per step."""

    def to_kwargs(self) -> dict[str, bool]:
        return {"enabled": self.enabled, "cache_enabled": self.cache_enabled}


def forget_models() -> None:
    """Empty a cache in which torch 2.6 keeps each model whose state was saved, so that it is never freed."""
    if hasattr(state_dict._get_fqns, "cache_clear"):
        state_dict._get_fqns.cache_clear()


def fingerprint(dataset: Dataset) -> str:
    """Return the hash that `datasets` keeps of the content of a dataset and of all its transforms."""
    return dataset._fingerprint


def raw_mode_of_low_bytes(photo: Image.Image) -> str | None:
    """Return the decoder mode that reads the low bytes of 16-bit colours, or None for other photos. Pillow 11 to 13."""
    modes = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGB;16N": "RGB;16B"}
    modes |= {name.replace("RGB", "RGBA"): other.replace("RGB", "RGBA") for name, other in modes.items()}
    if not getattr(photo, "tile", None):
        return None
    arguments = photo.tile[0][3]
    return modes.get(arguments[0] if isinstance(arguments, tuple) else arguments)


def read_with(photo: Image.Image, raw_mode: str) -> None:
    """Let the decoder of a photo that is open, but not loaded, use another mode."""
    tiles = []
    for name, extents, offset, arguments in photo.tile:
        arguments = (raw_mode, *arguments[1:]) if isinstance(arguments, tuple) else raw_mode
        tiles.append(type(photo.tile[0])(name, extents, offset, arguments))
    photo.tile = tiles
