"""The precision that a model runs in, and its attention kernel: what its device computes fastest, or what was asked for."""

import os
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from corel_diffusers.files import UserError


def resolve_precision(wanted: str, device_type: str) -> str:
    """ "auto" -> fp16 on CUDA, bf16 where the CPU computes it in hardware, else no; what `accelerate launch` was told comes first.

    Raises UserError for fp16 without a GPU, which accelerate would silently run in fp32.
    """
    gpu = device_type == "cuda"
    if wanted == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = launched if launched in ("fp16", "bf16") else "fp16" if gpu else "bf16" if has_bf16 else "no"
    if wanted == "fp16" and not gpu:
        raise UserError("--mixed-precision fp16 needs a GPU and there is none: give auto, bf16 or no")
    return wanted


def arithmetic(device: torch.device) -> str:
    """Names how a device computes in float32, to the last bit: "avx512", or "sm90-tf32", with "conv" behind it where only convolutions are
    in TF32. What is kept on the disk bears it in its name, or a run that goes on elsewhere would read values that it would not have
    computed."""
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability().lower()
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    kinds = {(True, True): "-tf32", (True, False): "-tf32conv", (False, True): "-tf32matmul"}
    return f"sm{major}{minor}" + (kinds.get((convolutions, products), "") if major >= 8 else "")


def autocast(precision: str, device_type: str) -> AbstractContextManager:
    """Within, matrix products and convolutions run in that precision; "no" leaves everything as it is."""
    return torch.autocast(device_type, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision), enabled=precision != "no")


class Autocast(AutocastKwargs):
    """accelerate's, which looks at a copy of the environment each time that it is asked what it holds: 0.7 ms of a step."""

    def to_kwargs(self) -> dict[str, bool]:
        return {"enabled": self.enabled, "cache_enabled": self.cache_enabled}


def use(accelerator: Accelerator, precision: str, attention: str) -> None:
    """From here on, on a CPU, passes run in that precision ("bf16" or "no") and attention by that kernel ("fused" or "math"), in models in
    training (models/layers.py) if they are built from here on.

    The accelerator is one of bf16. On a GPU it decides by itself.
    """
    if accelerator.device.type == "cpu":
        accelerator.autocast_handler = Autocast(enabled=precision != "no")
        torch.backends.cuda.enable_flash_sdp(attention == "fused")  # named after CUDA, and the CPU's as well
