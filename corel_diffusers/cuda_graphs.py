"""CUDA graphs: the kernels of a whole pass are started at once, where starting them one after the other takes longer than they run.

A small model's forward and backward pass are over a thousand kernels of a few microseconds each, and a CPU starts one in about ten.
"""

import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.utils._pytree import tree_leaves

from corel_diffusers.arguments import TrainingArguments
from corel_diffusers.files import first_line

Pass = TypeVar("Pass", bound=Callable)
PASSES = 10  # timed, after three to warm up


def recorded(args: TrainingArguments, accelerator: Accelerator, name: str, run: Pass, *inputs: torch.Tensor) -> Pass:
    """`run` on one GPU, its forward and backward pass recorded and from then on replayed where that is faster; else as it is.

    run: a module in training mode, before accelerate prepares it, or a function without weights; tensors in the shapes of `inputs` ->
    tensors. name: of the pass, for people. What is recorded writes into the same memory each time: gradients of several passes would
    not add up there, nor reach other processes.
    """
    alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    if not alone or args.grad_accum > 1 or args.compile or args.gradient_checkpointing:
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
    except RuntimeError as error:  # out of memory too: what is recorded keeps its own
        replayed, after, told = run, before, first_line(error)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())  # the old one takes itself to be recorded still
    if after < before:
        accelerator.print(f"CUDA graphs: the {name}'s passes take {told}")
        return replayed
    vars(run).pop("forward", None)
    accelerator.print(f"CUDA graphs: none of the {name}'s passes ({told})")
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
