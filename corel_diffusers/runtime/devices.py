"""The device of a run: its name, and copies to it."""

import torch
from accelerate import Accelerator


def device_name(accelerator: Accelerator) -> str:
    """Return a readable name of the hardware that the run uses, for example "2 x NVIDIA L4" or "CPU (8 threads)"."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        name = f"{accelerator.device.type.upper()} ({threads} thread{'s' if threads > 1 else ''})"
    return f"{accelerator.num_processes} x {name}" if accelerator.num_processes > 1 else name


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the values on the device.

    Values for a GPU are first copied to pinned memory. The CPU does not have to wait while a GPU copies pinned memory.
    """
    needs_pinning = device.type == "cuda" and not values.is_cuda and not values.is_pinned()
    return (values.pin_memory() if needs_pinning else values).to(device, non_blocking=device.type == "cuda")
