"""Compile the model with torch.compile, and measure what it gains."""

import math
import time

import numpy as np
import torch
from accelerate import Accelerator

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.files import UserError, first_line
from corel_diffusers.internals import undo_compile
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.runtime.sharding import is_sharded


class Compilation:
    """--compile: compile the model during the run, and print how much time that saves.

    The first steps run uncompiled, so that there is a speed to compare with. A resumed run is compiled after its first
    step, if it was compiled when it stopped. The keys of the checkpoints do not change.

    The gradients of the compiled model are checked. With torch 2.13 on a CPU, the compiler loses the gradients of most
    layers of a VAE in bf16.
    """

    PLAIN, WARMUP, COMPILED = 10, 10, 20  # steps of each phase; the three steps before them are not timed
    MIN_COSINE = 0.9  # of uncompiled and compiled gradients; the rounding of bf16 alone gives 0.99

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, model: torch.nn.Module, first_step: int
    ) -> None:
        self.accelerator, self.model = accelerator, accelerator.unwrap_model(model)
        # the end time of each step; None: the steps are not timed
        self.times: list[float] | None = [] if args.compile and not first_step else None
        self.inputs: tuple[torch.Tensor, ...] = ()  # of the last step
        self.input_hook = self.model.register_forward_pre_hook(self.keep) if args.compile else None

    def keep(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = inputs

    def tick(self, step: int, steps_to_come: int) -> None:
        """Call this after each step. It compiles the model when it is time, and later prints the report."""
        if self.times is not None:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.monotonic())
        if self.input_hook and step >= 3 + self.PLAIN:
            self.input_hook.remove()
            self.input_hook = None
            is_compiled = self.compile()
            self.inputs = ()  # free the batch
            if not is_compiled:
                self.times = None
        if self.times is not None and len(self.times) == 3 + self.PLAIN + self.WARMUP + self.COMPILED:
            seconds = np.diff(self.times)
            plain, compiled = np.median(seconds[2 : 2 + self.PLAIN]), np.median(seconds[-self.COMPILED :])
            warmup = seconds[2 + self.PLAIN : -self.COMPILED].sum() - self.WARMUP * compiled
            self.accelerator.print(compilation_report(plain, compiled, warmup, steps_to_come))
            self.times = None

    def compile(self) -> bool:
        """Compile the model, and return True. If the compiled gradients are wrong, undo it and return False.

        The gradients are not checked for a model with dropout, nor for a sharded model.
        """
        # with dropout, no two forward passes are equal
        has_dropout = any(isinstance(part, torch.nn.Dropout) and part.p for part in self.model.modules())
        if has_dropout or is_sharded(self.accelerator):
            self.model.compile()
            return True
        plain_gradient = self.gradient()
        self.model.compile()
        cosine = float(torch.nn.functional.cosine_similarity(plain_gradient, self.gradient(), dim=0))
        cosine = broadcast_from_main(self.accelerator, cosine)
        if cosine > self.MIN_COSINE or not plain_gradient.isfinite().all():
            return True
        undo_compile(self.model)
        reason = f"a compiler bug changes the gradients of the model (cosine similarity {cosine:.2f})"
        self.accelerator.print(f"--compile: {reason}: the run continues uncompiled")
        return False

    def gradient(self) -> torch.Tensor:
        """Return the gradient of a fixed weighted sum of the model's outputs for the inputs of the last step.

        The gradient is with respect to all weights: (number of weights,).
        """
        with self.accelerator.autocast():  # as in the loops, because the compiler takes autocast into account
            outputs = [values for values in self.model(*self.inputs) if values.requires_grad]
        fixed = torch.Generator().manual_seed(0)
        # divided, because fp16 overflows at a few 10,000
        weights = [torch.randn(values.shape, generator=fixed) / values.numel() ** 0.5 for values in outputs]
        total = sum((values * weight.to(values.device)).sum() for values, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(total, list(self.model.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([values.float().flatten() for values in gradients])


def require_compiler(device_type: str) -> None:
    """Check that torch.compile works on this machine. Otherwise it would only fail in the middle of the run.

    Raises:
        UserError: it does not work, for example because there is no C++ compiler.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device_type))
    except Exception as error:  # torch.compile raises many types of exceptions
        missing = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        raise UserError(
            f"--compile: torch.compile does not work here ({first_line(error)}): install {missing}, or omit --compile"
        ) from None


def compilation_report(plain: float, compiled: float, warmup: float, steps_to_come: int) -> str:
    """Return the line that tells the user whether compiling saves time in this run.

    Args:
        plain, compiled: seconds per step without and with compilation.
        warmup: seconds that compiling took.
        steps_to_come: number of steps until the end of the run.
    """
    line = (
        f"--compile: {1e3 * compiled:.3g} ms per step instead of {1e3 * plain:.3g}, after {warmup:.0f} s of compiling"
    )
    break_even_steps = warmup / (plain - compiled) if compiled < plain else math.inf
    if break_even_steps > steps_to_come:
        return f"{line}: compiling costs this run more time than it saves: omit --compile"
    return f"{line}: it saves time after {break_even_steps:,.0f} of {steps_to_come:,} steps"
