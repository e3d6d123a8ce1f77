"""FSDP: the weights, gradients and optimizer state of a model are sharded over several GPUs.

The functions here also collect full tensors, for the ranks that need them.
"""

import copy

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from corel_diffusers.files import UserError


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether `accelerate launch --use_fsdp` started this run."""
    return accelerator.distributed_type == DistributedType.FSDP


def set_sharding(accelerator: Accelerator, optimizer: str) -> None:
    """Configure FSDP: the units to shard, and float32.

    Each of the model's `_no_split_modules` is sharded as one unit, unless the launcher sets another policy. The weights
    stay in float32, and autocast computes from them as it does without FSDP.

    Raises:
        UserError: FSDP version 1, or the Muon optimizer.
    """
    if not accelerator.is_fsdp2:
        raise UserError(
            "--use_fsdp: FSDP version 1 is not supported, because its shards cannot be read here: add --fsdp_version 2"
        )
    if optimizer == "muon":
        raise UserError(
            "--optimizer muon needs full matrices, but FSDP shards them: give adamw, or launch without --use_fsdp"
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    plugin.mixed_precision_policy = None


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a sharded one, and any other tensor unchanged. Call it on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_from_main(value: torch.Tensor, like: torch.Tensor, is_distributed: bool) -> torch.Tensor:
    """Return the main process's full tensor on every rank, sharded like `like` if that is sharded.

    is_distributed: whether there are several processes.
    """
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)  # it uses rank 0's value
    return broadcast(value) if is_distributed else value


def unsharded_copy(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return a full copy of a model that is about to be sharded.

    The model itself is changed to the contiguous memory format, because FSDP cannot shard channels last.
    """
    full_copy = copy.deepcopy(model).to(device)
    model.to(memory_format=torch.contiguous_format)
    return full_copy
