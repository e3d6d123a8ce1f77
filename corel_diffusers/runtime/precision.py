"""Mixed precision: resolve and set what the flags ask for."""

import os
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from corel_diffusers.files import UserError
from corel_diffusers.internals import FastAutocast, has_bf16_in_hardware


def resolve_precision(wanted: str, device_type: str) -> str:
    """Return the mixed precision "fp16", "bf16" or "no" for the flag `wanted`.

    "auto" becomes fp16 or bf16 if `accelerate launch` asks for it. Otherwise it becomes fp16 on CUDA, bf16 on a CPU
    with bf16 in hardware, and no on any other device.

    Raises:
        UserError: fp16 without a GPU. accelerate would silently run it in fp32.
    """
    is_cuda = device_type == "cuda"
    if wanted == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched in ("fp16", "bf16"):
            wanted = launched
        elif is_cuda:
            wanted = "fp16"
        else:
            wanted = "bf16" if has_bf16_in_hardware() else "no"
    if wanted == "fp16" and not is_cuda:
        raise UserError(
            "--mixed-precision fp16 needs a GPU, but there is none: give auto, bf16 or no; to "
            "continue a run that began in fp16, add --change-precision"
        )
    return wanted


def arithmetic(device: torch.device) -> str:
    """Return a name for the float32 arithmetic of a device, such as "avx512" or "sm90-tf32".

    Devices with the same name compute the same values to the last bit. The keys of caches on disk contain the name.
    Otherwise, a run that is resumed on another device would read values that this device would not compute.
    "-tf32conv" and "-tf32matmul": only convolutions, or only matrix products, are in TF32.
    """
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability().lower()
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    kinds = {(True, True): "-tf32", (True, False): "-tf32conv", (False, True): "-tf32matmul"}
    return f"sm{major}{minor}" + (kinds.get((convolutions, products), "") if major >= 8 else "")


def autocast(precision: str, device_type: str) -> AbstractContextManager:
    """Run matrix products and convolutions in this precision inside this context. "no" changes nothing."""
    return torch.autocast(
        device_type, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision), enabled=precision != "no"
    )


def set_precision(accelerator: Accelerator, precision: str) -> None:
    """Set the precision on a CPU: "bf16" or "no". Do nothing on a GPU. The accelerator must be created with bf16."""
    if accelerator.device.type == "cpu":
        accelerator.autocast_handler = FastAutocast(enabled=precision != "no")
