"""CUDA graphs: the kernels of a whole pass are started at once, where starting them one after the other takes longer than they run.

A small model's forward and backward pass are over a thousand kernels of a few microseconds each, and a CPU starts one in about ten.
"""

import gc
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType
from torch import nn
from torch.utils._pytree import tree_leaves

from corel_diffusers.arguments import TrainingArguments
from corel_diffusers.files import UserError, first_line, is_out_of_memory
from corel_diffusers.planning import CLEARLY

Pass = TypeVar("Pass", bound=Callable)
PASSES = 10  # timed, after three to warm up


def recorded(args: TrainingArguments, accelerator: Accelerator, name: str, run: Pass, *inputs: torch.Tensor) -> Pass:
    """`run`, its forward and backward pass recorded and from then on replayed where that is clearly faster; else as it is.

    run: a module in training mode, before accelerate prepares it, or a function without weights; tensors in the shapes of `inputs` ->
    tensors. A pass goes backward once. name: of the pass, for people; "" for a trial that nobody is told of. Only on one GPU in one
    process: what is recorded has its gradients in the same memory each time, where those of several passes would not add up and no
    other process would look for them. Raises UserError for a model that no graph can hold: the recording broken off leaves CUDA unfit.
    """
    alone = accelerator.device.type == "cuda" and accelerator.distributed_type == DistributedType.NO
    if not args.cuda_graphs or not alone or args.grad_accum > 1 or args.compile or args.gradient_checkpointing:
        return run
    inputs = tuple(values.detach().to(accelerator.device, copy=True).requires_grad_(values.requires_grad) for values in inputs)
    weights = list(run.to(accelerator.device).parameters()) if isinstance(run, nn.Module) else []
    before = seconds_a_pass(accelerator, run, inputs, weights)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # which recording has to be another than the run's
            with accelerator.autocast(AutocastKwargs(cache_enabled=False)):  # weights are cast within, anew each time
                replayed = torch.cuda.make_graphed_callables(run, inputs, allow_unused_input=True)
            after = seconds_a_pass(accelerator, replayed, inputs, weights)
        told = f"{1e3 * after:.3g} ms in place of {1e3 * before:.3g}"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            way_out = "give --no-cuda-graphs"
            raise UserError(f"the {name or 'model'}'s passes cannot be recorded as CUDA graphs ({first_line(error)}): {way_out}") from None
        replayed, after, told = run, before, "out of memory"
    faster = CLEARLY * after < before  # what is recorded keeps memory of its own
    if name:
        accelerator.print(f"CUDA graphs: {'' if faster else 'none of '}the {name}'s passes{' take' if faster else ''} ({told})")
    if faster:
        return replayed
    del replayed
    vars(run).pop("forward", None)
    gc.collect()  # it is its own owner: nothing else frees its memory
    torch.cuda.empty_cache()
    return run


def seconds_a_pass(accelerator: Accelerator, run: Callable, inputs: tuple[torch.Tensor, ...], weights: list[nn.Parameter]) -> float:
    """The mean time of a forward and a backward pass."""
    wanted = [values for values in (*inputs, *weights) if values.requires_grad]
    for place in range(3 + PASSES):
        if place == 3:
            torch.cuda.synchronize()
            began = time.perf_counter()
        with accelerator.autocast():
            made = [values for values in tree_leaves(run(*inputs)) if values.requires_grad]
        torch.autograd.grad(made, wanted, [torch.ones_like(values) for values in made], allow_unused=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / PASSES
