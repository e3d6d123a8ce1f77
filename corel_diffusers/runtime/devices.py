"""Describe the device of a run."""

import torch
from accelerate import Accelerator


def device_name(accelerator: Accelerator) -> str:
    """Return a readable name of the hardware that the run uses, for example "2 x NVIDIA L4" or "CPU (8 threads)"."""
    gpu = accelerator.device.type == "cuda"
    name = (
        torch.cuda.get_device_name()
        if gpu
        else f"{accelerator.device.type.upper()} ({torch.get_num_threads()} threads)"
    )
    return f"{accelerator.num_processes} x {name}" if accelerator.num_processes > 1 else name
