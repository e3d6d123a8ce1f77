"""FSDP: a model whose weights, gradients and optimizer lie in parts on several GPUs, and the whole of it where a rank needs that."""

import copy

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from corel_diffusers.files import UserError


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether `accelerate launch --use_fsdp` started this run."""
    return accelerator.distributed_type == DistributedType.FSDP


def set_sharding(accelerator: Accelerator, optimizer: str) -> None:
    """How FSDP cuts a model: each of its `_no_split_modules` by itself, where the launcher names nothing else, and in float32, which
    autocast computes from as it does without FSDP. Raises UserError for what cannot be cut.
    """
    if not accelerator.is_fsdp2:
        raise UserError("--use_fsdp: its first version cuts a model into parts that nothing here can read: add --fsdp_version 2")
    if optimizer == "muon":
        raise UserError("--optimizer muon takes whole matrices, and FSDP cuts them: give adamw, or launch without --use_fsdp")
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    plugin.mixed_precision_policy = None


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each rank holds a part; any other as it is. Called on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def from_first(value: torch.Tensor, like: torch.Tensor, several: bool) -> torch.Tensor:
    """The first rank's whole tensor, on every rank: cut as `like` is, whole where that is not cut."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)  # which takes the first rank's
    return broadcast(value) if several else value


def whole_copy(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A model that stays whole beside the one that will be cut, which loses the memory layout that cutting does not take."""
    beside = copy.deepcopy(model).to(device)
    model.to(memory_format=torch.contiguous_format)
    return beside
