"""Muon for the weights of convolutions and linear layers, AdamW for the rest.

torch.optim.Muon takes matrices only and, like the packages around, iterates in bfloat16, which a CPU without it emulates: six times
slower than float32 there, more than the whole training step takes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that lifts small singular values fastest (Jordan et al. 2024)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024, github.com/KellerJordan/Muon), after Liu et al. 2025.

    W <- W (1 - lr wd) - lr 0.2 sqrt(max(rows, columns)) O, where O is the nearest semi-orthogonal matrix to the Nesterov momentum:
    the factor gives the step the size that AdamW's has (arXiv:2502.16982, eq. 4). A convolution's weight (out, in, h, w) counts as
    a matrix (out, h w in), as it lies in memory with channels last.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape, matrices = defaultdict(list), []
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                for weight in weights:
                    if "momentum" not in self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight)
                momenta = [self.state[weight]["momentum"] for weight in weights]
                gradients = [w.grad for w in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                matrices.append(torch.stack([step.movedim(1, -1) for step in ahead]).flatten(2))
            for weights, steps in zip(by_shape.values(), orthogonal(matrices), strict=True):
                size = 0.2 * max(steps.shape[1:]) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                inner = [w.movedim(1, -1) for w in weights]
                torch._foreach_add_(inner, [step.view_as(w) for step, w in zip(steps, inner, strict=True)], alpha=-group["lr"] * size)


@contextmanager
def float32_products() -> Iterator[None]:
    """Within, CUDA multiplies matrices in float32: TF32 keeps 10 bits of a Gram matrix, and where its rounding makes an eigenvalue
    negative, the polynomials amplify that."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@float32_products()
def orthogonal(batches: Sequence[torch.Tensor], iterations: int = 5) -> list[torch.Tensor]:
    """Each (B, rows, columns) -> about the nearest semi-orthogonal matrices: singular values between 0.7 and 1.2, by Newton-Schulz.

    Each iteration multiplies by a polynomial of the Gram matrix, and those commute: so the iterations run on the Gram matrix, on the
    shorter side, and the matrices themselves are touched twice. Gram matrices of one size are one batch, whatever the longer sides.
    """
    wide = [batch.mT if batch.shape[1] > batch.shape[2] else batch for batch in batches]
    wide = [batch / batch.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7) for batch in wide]
    by_side = defaultdict(list)
    for place, batch in enumerate(wide):
        by_side[batch.shape[1]].append(place)
    for places in by_side.values():
        products = newton_schulz(torch.cat([wide[place] @ wide[place].mT for place in places]), iterations)
        for place, product in zip(places, products.split([len(wide[place]) for place in places]), strict=True):
            wide[place] = product @ wide[place]
    return [there.mT if batch.shape[1] > batch.shape[2] else there for batch, there in zip(batches, wide, strict=True)]


def newton_schulz(gram: torch.Tensor, iterations: int) -> torch.Tensor:
    """Gram matrices (B, n, n) of matrices with singular values up to 1 -> what those are multiplied by, (B, n, n)."""
    a, b, c = COEFFICIENTS
    identity = torch.eye(gram.shape[1], device=gram.device)

    def factor() -> torch.Tensor:
        return a * identity + b * gram + c * gram @ gram

    product = step = factor()
    for _ in range(iterations - 1):
        gram = step @ gram @ step
        step = factor()
        product = step @ product
    return product


class Together(torch.optim.Optimizer):
    """Several optimizers as one: what scales fp16 gradients must see a step once, whatever it consists of."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:  # the parts hold groups and state
        self.parts, self.defaults = parts, {}

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict:
        return {weight: values for part in self.parts for weight, values in part.state.items()}

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, values in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(values)


def build_optimizer(name: str, model: nn.Module, learning_rate: float, weight_decay: float, muon_scale: float) -> torch.optim.Optimizer:
    """ "adamw", or "muon": Muon for the weights of the layers within, AdamW for the first and last layers, norms, biases, embeddings.

    muon_scale: Muon's learning rate over AdamW's.
    """
    hidden = []
    if name == "muon":
        outer = ("conv_in", "conv_out", "class_embedding", "told", "guess")
        hidden = [p for n, p in model.named_parameters() if p.ndim >= 2 and not any(part in n.split(".") for part in outer)]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=learning_rate, weight_decay=weight_decay, fused=True)
    if not hidden:
        return adamw
    muon = Muon(hidden, muon_scale * learning_rate, weight_decay=weight_decay / muon_scale)
    muon.param_groups[0]["lr_scale"] = muon_scale
    return Together(muon, adamw)
