"""The exponential moving average of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.runtime.sharding import full_tensor


class EMA(EMAModel):
    """The EMA of diffusers with a faster step: one pass over the weights instead of two passes and a copy."""

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - self.cur_decay_value)


def build_ema(args: TrainingArguments, model: torch.nn.Module) -> EMA | None:
    """Return an EMA whose decay warms up as 1 - (1 + step)^(-2/3) to at most --ema-decay. None for --no-ema."""
    if not args.ema:
        return None
    return EMA(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3, foreach=True)


@contextmanager
def ema_weights(
    ema: EMAModel | None, model: torch.nn.Module, unsharded: torch.nn.Module | None = None
) -> Iterator[None]:
    """Give the model the EMA weights and switch it to evaluation mode, within the context.

    Args:
        ema: None for --no-ema. The model then keeps its own weights.
        unsharded: the unsharded copy of a sharded model. The weights are copied to it, and the model does not change.
    """
    if unsharded:
        with torch.no_grad():
            for target, source in zip(
                unsharded.parameters(), ema.shadow_params if ema else model.parameters(), strict=True
            ):
                target.copy_(full_tensor(source))
        unsharded.eval()
        yield
        return
    model.eval()
    if ema:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield
    finally:
        if ema:
            ema.restore(model.parameters())
        model.train()
