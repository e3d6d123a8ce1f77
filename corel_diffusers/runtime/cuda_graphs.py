"""CUDA graphs: launch all kernels of a forward and backward pass at once.

The forward and backward pass of a small model has over a thousand kernels, which run for a few microseconds each. A CPU
needs about ten microseconds to launch one kernel, so single launches take longer than the kernels run.
"""

import gc
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType
from torch import nn

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.files import UserError, first_line, is_out_of_memory
from corel_diffusers.internals import tensors_in, undo_graph_capture
from corel_diffusers.runtime.timing import MIN_SPEEDUP

Forward = TypeVar("Forward", bound=Callable)
TIMED_PASSES = 10  # after three passes to warm up


def capture_if_faster(
    args: TrainingArguments, accelerator: Accelerator, name: str, forward: Forward, *inputs: torch.Tensor
) -> Forward:
    """Capture the forward and backward pass of `forward` as CUDA graphs, if that is clearly faster.

    Return the function or module that replays the graphs, or `forward` unchanged if the graphs are not used.

    forward: a module in training mode, before accelerate prepares it, or a function without weights. It takes tensors
        of the shapes of `inputs` and returns tensors. Each forward pass may have one backward pass only.
    name: the name of the model or loss in messages. "" prints no message (for timing trials).

    Graphs are used on one GPU in one process only, with one image size, and without gradient accumulation. A graph
    always writes its gradients to the same memory: several passes would not add up there, and other processes would not
    read it.

    Raises:
        UserError: the passes cannot be captured. After a failed capture, CUDA cannot be used in this process.
    """
    alone = accelerator.device.type == "cuda" and accelerator.distributed_type == DistributedType.NO
    is_repeated = not (args.grad_accum > 1 or args.compile or args.gradient_checkpointing or args.aspect_buckets)
    if not args.cuda_graphs or not alone or not is_repeated:
        return forward
    inputs = tuple(
        values.detach().to(accelerator.device, copy=True).requires_grad_(values.requires_grad) for values in inputs
    )
    weights = list(forward.to(accelerator.device).parameters()) if isinstance(forward, nn.Module) else []
    before = seconds_per_pass(accelerator, forward, inputs, weights)
    try:
        with warnings.catch_warnings():
            # capturing needs a stream that is not the stream of the run
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
            # without the cache, the graph itself casts the weights, in each replay
            with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
                replayed = torch.cuda.make_graphed_callables(forward, inputs, allow_unused_input=True)
            after = seconds_per_pass(accelerator, replayed, inputs, weights)
        result = f"{1e3 * after:.3g} ms instead of {1e3 * before:.3g} ms"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            hint = "give --no-cuda-graphs"
            raise UserError(
                f"the passes of the {name or 'model'} cannot be captured as CUDA graphs ({first_line(error)}): {hint}"
            ) from None
        replayed, after, result = forward, before, "out of memory"
    faster = MIN_SPEEDUP * after < before  # a small gain is not enough, because graphs need memory of their own
    if name:
        accelerator.print(f"CUDA graphs: {'used' if faster else 'not used'} for the passes of the {name} ({result})")
    if faster:
        if isinstance(replayed, nn.Module):
            replayed.register_forward_pre_hook(partial(check_inputs, expected=shapes_and_types(inputs)))
        return replayed
    del replayed
    undo_graph_capture(forward)
    gc.collect()  # the graphs are in a reference cycle, so only the garbage collector frees their memory
    torch.cuda.empty_cache()
    return forward


def check_inputs(module: nn.Module, inputs: tuple[torch.Tensor, ...], expected: list) -> None:
    """Raise TypeError if inputs in training do not have the shapes and types of the captured ones.

    A graph copies its inputs into the memory of the captured ones. It would silently round 0.5 to the integer 0.
    """
    if module.training and (given := shapes_and_types(inputs)) != expected:
        raise TypeError(f"CUDA graphs were captured for inputs {expected}, not for {given}")


def shapes_and_types(inputs: tuple[torch.Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(values.shape, values.dtype) for values in inputs]


def seconds_per_pass(
    accelerator: Accelerator, forward: Callable, inputs: tuple[torch.Tensor, ...], weights: list[nn.Parameter]
) -> float:
    """Return the mean time of a forward and a backward pass."""
    differentiable = [values for values in (*inputs, *weights) if values.requires_grad]
    for index in range(3 + TIMED_PASSES):
        if index == 3:
            torch.cuda.synchronize()
            began = time.perf_counter()
        with accelerator.autocast():
            outputs = [values for values in tensors_in(forward(*inputs)) if values.requires_grad]
        torch.autograd.grad(outputs, differentiable, [torch.ones_like(values) for values in outputs], allow_unused=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / TIMED_PASSES
