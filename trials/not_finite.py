"""NaN and infinity in both scripts, at each phase, in fp32 and bf16.

They come up in gradients, weights, averaged weights, the optimizer's state, the loss and the latents.

Right: the step is skipped, or the run goes back, or it stops with its reason. All that is left is finite.
"""

import math
import shutil
from functools import partial

import torch
from common import Base, Trial, fresh_folder, not_finite, rng_of, run
from torch.optim.optimizer import register_optimizer_step_pre_hook

STEPS = 24
FLAGS = {
    "VAE": ("train_vae", []),
    "VAE with a discriminator": ("train_vae", ["--adversarial-weight", 0.3, "--adversarial-start", 0.3]),
    "VAE with a target for the KL": ("train_vae", ["--kl-target", 50]),
    "UNet": ("train_unet", []),
    "UNet with Muon and plateau": ("train_unet", ["--optimizer", "muon", "--lr-scheduler", "plateau"]),
}


def poison(kind: str, value: float, steps: list[int]) -> None:
    """Set one value of a weight or of the optimizer's state to `value` at these optimizer steps."""
    count, first = 0, None

    def hook(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        nonlocal count, first
        first = first or id(optimizer)
        count += id(optimizer) == first
        if id(optimizer) != first or count not in steps:
            return
        weight = next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        state = next((v for v in optimizer.state[weight].values() if v.ndim), weight.data)
        poisoned = {"weight": weight.data, "state": state}[kind]
        poisoned[(0,) * poisoned.ndim] = value

    register_optimizer_step_pre_hook(hook)


def poison_backward(kind: str, value: float, steps: list[int]) -> None:
    """In these steps, multiply the loss by `value`, or set a gradient to it after the backward pass."""
    from accelerate import Accelerator

    original, count = Accelerator.backward, 0

    def backward(self: Accelerator, loss: torch.Tensor, **options: object) -> None:
        nonlocal count
        count += 1
        is_due = count in steps
        original(self, loss * value if is_due and kind == "loss" else loss, **options)
        if is_due and kind == "gradient":
            weight = next(p for p in self._models[0].parameters() if p.grad is not None)
            weight.grad[(0,) * weight.ndim] = value

    Accelerator.backward = backward


def poison_values(kind: str, value: float, calls: list[int]) -> None:
    """In these calls, set one value of a batch of latents, or of the averaged weights, to `value`."""
    from corel_diffusers.data.batches import ArrayBatches
    from corel_diffusers.training.ema import EMA

    owner, name = {"latents": (ArrayBatches, "__getitem__"), "average": (EMA, "step")}[kind]
    original, count = getattr(owner, name), 0

    def changed(self: ArrayBatches | EMA, argument: object) -> list[torch.Tensor] | None:
        nonlocal count
        count += 1
        batch = original(self, argument)
        if count in calls:
            values = self.shadow_params[0] if kind == "average" else next(v for v in batch if v.is_floating_point())
            values[(0,) * values.ndim] = value
        return batch

    setattr(owner, name, changed)


POISONS = {
    "gradient": poison_backward,
    "loss": poison_backward,
    "weight": poison,
    "state": poison,
    "average": poison_values,
    "latents": poison_values,
}


def trial(base: Base, name: str, kind: str, value: float, steps: list[int], precision: str) -> str:
    folder = fresh_folder(f"{name} {kind} {value} {steps} {precision}")
    script, flags = FLAGS[name]
    words = [*getattr(base, script)(folder / "run", *flags, "--max-train-steps", STEPS, "--checkpoint-steps", 4)]
    at = words.index("--checkpoint-every")
    del words[at : at + 2]
    words[words.index("--mixed-precision") + 1] = precision
    done = run(*words, folder=folder, before=("not_finite", POISONS[kind].__name__, kind, value, steps))
    if done.has_traceback or done.code not in (0, 2):
        return f"exit code {done.code}: {done.last_line}"
    told = any(word in done.output for word in ("skipped", "goes back", "NaN or infinite"))
    wrong = not_finite(folder / "run") or ("" if told else "nothing was said")
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def trials(base: Base, seed: int, count: int = 120) -> list[Trial]:
    found = []
    for name in FLAGS:
        for kind in POISONS if name.startswith("UNet") else [kind for kind in POISONS if kind != "latents"]:
            for value in (math.nan, math.inf):
                for steps in ([1], [9], [10, 11, 12], list(range(9, 60))):
                    for precision in ("no", "bf16"):
                        title = f"{name}, {kind} {value} at {steps[0]} and {len(steps) - 1} more, {precision}"
                        found.append(Trial(title, partial(trial, base, name, kind, value, steps, precision)))
    rng_of(seed, "not_finite").shuffle(found)
    return found[:count]
