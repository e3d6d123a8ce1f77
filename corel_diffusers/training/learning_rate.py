"""The learning rate schedules: `lr_factor` computes the rate of a step, `LearningRate` sets it in the optimizers."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from diffusers.optimization import get_scheduler

from corel_diffusers.config.flag_groups import OUR_LR_SCHEDULES
from corel_diffusers.config.training import TrainingArguments


def lr_factor(args: TrainingArguments, step: int, total_steps: int) -> float:
    """Return the learning rate of a step as a fraction of --learning-rate. It depends on the arguments only.

    cosine: half a period of a cosine, down to --lr-min (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5).
    cosine_warm_restarts: three such half periods. Each is twice as long as the one before, and the third ends with the
    run (same paper, T_mult = 2).
    none, plateau: 1 after the warmup.
    All other names are schedules of diffusers: the value of diffusers.optimization.get_scheduler.
    """
    name, warmup, min_factor = args.lr_scheduler, args.lr_warmup_steps, args.lr_min / args.learning_rate
    if name not in OUR_LR_SCHEDULES:
        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        return get_scheduler(name, dummy, num_warmup_steps=warmup, num_training_steps=total_steps).lr_lambdas[0](step)
    if step < warmup:
        return (step + 1) / warmup
    if name in ("none", "plateau"):
        return 1.0
    if name not in ("cosine", "cosine_warm_restarts"):
        raise ValueError(f"the learning rate of {name} is not defined")
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if name == "cosine_warm_restarts" and progress < 1:
        start, length = next((s, n) for s, n in ((3 / 7, 4 / 7), (1 / 7, 2 / 7), (0, 1 / 7)) if progress >= s)
        progress = (progress - start) / length
    return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * progress)) / 2


class LearningRate:
    """Sets the learning rate of the optimizers from the step and, for "plateau", from the validation losses."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], args: TrainingArguments) -> None:
        self.optimizers, self.args = optimizers, args
        self.now, self.plateau = 0.0, None
        if args.lr_scheduler == "plateau":  # torch's scheduler runs on a dummy whose rate multiplies the peak
            dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                dummy, factor=0.5, patience=10, min_lr=args.lr_min / args.learning_rate
            )

    def set(self, step: int, total_steps: int, factor: float = 1.0) -> None:
        """Set the learning rate of `step` in a run of `total_steps`, multiplied by `factor`."""
        scale = self.plateau.optimizer.param_groups[0]["lr"] if self.plateau else 1.0
        self.now = self.args.learning_rate * lr_factor(self.args, step, total_steps) * scale * factor
        for group in chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            group["lr"] = self.now * group.get("lr_scale", 1.0)

    def validated(self, loss: float) -> None:
        """Give a validation loss to "plateau": after more than ten validations without progress, the rate is halved."""
        if self.plateau:
            self.plateau.step(loss)

    def state_dict(self) -> dict:
        if not self.plateau:
            return {}
        return {
            "scale": self.plateau.optimizer.param_groups[0]["lr"],
            "best": self.plateau.best,
            "bad": self.plateau.num_bad_epochs,
        }

    def load_state_dict(self, values: dict) -> None:
        if self.plateau:
            self.plateau.optimizer.param_groups[0]["lr"] = values["scale"]
            self.plateau.best, self.plateau.num_bad_epochs = values["best"], values["bad"]
