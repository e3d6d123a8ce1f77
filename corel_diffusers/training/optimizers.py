"""Optimizers: Muon, AdamW, and gradient clipping.

This file has its own Muon, because torch.optim.Muon takes matrices only and, like other packages, iterates in
bfloat16. A CPU without bfloat16 emulates it: that is six times slower than float32, and takes longer than the whole
training step.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from corel_diffusers.runtime.sharding import full_tensor, is_sharded

# coefficients of the quintic polynomial that raises small singular values fastest (Jordan et al. 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps (Jordan et al. 2024, github.com/KellerJordan/Muon), as in Liu et al. 2025.

    W <- W (1 - lr wd) - lr 0.2 sqrt(max(rows, columns)) O

    O is the semi-orthogonal matrix that is nearest to the Nesterov momentum. The factor 0.2 sqrt(max(rows, columns))
    gives the step the size of an AdamW step (arXiv:2502.16982, eq. 4). The weight of a convolution (out, in, h, w) is
    treated as a matrix (out, h w in), which is its memory layout with channels last.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
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
                nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
                matrices.append(torch.stack([step.movedim(1, -1) for step in nesterov]).flatten(2))
            for weights, steps in zip(by_shape.values(), orthogonalize(matrices), strict=True):
                scale = 0.2 * max(steps.shape[1:]) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                channels_last = [w.movedim(1, -1) for w in weights]
                torch._foreach_add_(
                    channels_last,
                    [step.view_as(w) for step, w in zip(steps, channels_last, strict=True)],
                    alpha=-group["lr"] * scale,
                )


@contextmanager
def full_float32_matmul() -> Iterator[None]:
    """Multiply matrices in float32 on CUDA, without TF32, inside this context.

    TF32 keeps 10 bits of a Gram matrix. If this rounding makes an eigenvalue negative, the polynomials amplify it.
    """
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@full_float32_matmul()
def orthogonalize(batches: Sequence[torch.Tensor], iterations: int = 5) -> list[torch.Tensor]:
    """Replace matrices (B, rows, columns) by the nearest semi-orthogonal matrices, by Newton-Schulz iterations.

    The result is approximate: its singular values are between 0.7 and 1.2.

    Each iteration multiplies the matrix by a polynomial of its Gram matrix. These polynomials commute, so all
    iterations run on the small Gram matrix (of the shorter side). The matrix itself is used only twice: to compute its
    Gram matrix, and in the final product. Gram matrices of the same size form one batch, even if the longer sides
    differ.
    """
    wide = [batch.mT if batch.shape[1] > batch.shape[2] else batch for batch in batches]
    wide = [batch / batch.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7) for batch in wide]
    by_side = defaultdict(list)
    for index, batch in enumerate(wide):
        by_side[batch.shape[1]].append(index)
    for indices in by_side.values():
        products = newton_schulz(torch.cat([wide[i] @ wide[i].mT for i in indices]), iterations)
        for index, product in zip(indices, products.split([len(wide[i]) for i in indices]), strict=True):
            wide[index] = product @ wide[index]
    return [
        result.mT if batch.shape[1] > batch.shape[2] else result for batch, result in zip(batches, wide, strict=True)
    ]


def newton_schulz(gram: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return the factors (B, n, n) that orthogonalise matrices, from their Gram matrices (B, n, n).

    The singular values of the matrices must be at most 1.
    """
    a, b, c = COEFFICIENTS
    identity = torch.eye(gram.shape[1], device=gram.device)

    def polynomial() -> torch.Tensor:
        return a * identity + b * gram + c * gram @ gram

    product = step = polynomial()
    for _ in range(iterations - 1):
        gram = step @ gram @ step
        step = polynomial()
        product = step @ product
    return product


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one. The gradient scaler of fp16 must see one optimizer and one step.

    The parts hold the parameter groups and the state, so the constructor of torch's Optimizer is not called.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
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


def build_optimizer(
    name: str,
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    muon_scale: float,
    adamw_layers: Sequence[str] = (),
    **adamw_options: object,
) -> torch.optim.Optimizer:
    """Return the optimizer `name`, "adamw" or "muon".

    "muon" uses Muon for the weights of the hidden layers, and AdamW for norms, biases and `adamw_layers`.

    Args:
        muon_scale: learning rate of Muon / learning rate of AdamW.
        adamw_layers: names of the layers that use AdamW. The model knows them: its first and last layers and its
            embeddings.
        adamw_options: betas and eps of torch.optim.AdamW.
    """
    hidden = []
    if name == "muon":
        hidden = [
            p
            for n, p in model.named_parameters()
            if p.ndim >= 2 and not any(layer in n.split(".") for layer in adamw_layers)
        ]
    hidden_ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in hidden_ids]
    adamw = torch.optim.AdamW(rest, lr=learning_rate, weight_decay=weight_decay, fused=True, **adamw_options)
    if not hidden:
        return adamw
    muon = Muon(hidden, muon_scale * learning_rate, weight_decay=weight_decay / muon_scale)
    muon.param_groups[0]["lr_scale"] = muon_scale
    return CombinedOptimizer(muon, adamw)


@dataclass
class SkippedSteps:
    """The number of steps that were skipped because their gradients were NaN or infinite. It stays on the device."""

    total: torch.Tensor | int = 0
    in_a_row: torch.Tensor | int = 0
    told: int = 0  # of the total, the number that the user has been told

    def add(self, norm: torch.Tensor | None) -> None:
        """Count a step by the norm of its gradients. None: gradients are still accumulated, there was no step."""
        if norm is not None:
            is_skipped = ~norm.isfinite()
            self.total = self.total + is_skipped
            self.in_a_row = (self.in_a_row + 1) * is_skipped


def optimizer_step(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    max_norm: float,
    not_clipped: Sequence[torch.nn.Parameter] = (),
) -> torch.Tensor | None:
    """Clip the gradients, update the weights and clear the gradients, after the last backward pass of a step.

    After the earlier ones, with --grad-accum, accelerate lets the optimizer do nothing.

    A step whose gradients are NaN or infinite is skipped. In fp16 the gradient scaler does this.

    Args:
        parameters: the parameters whose gradients are clipped together.
        not_clipped: the other parameters of the optimizer.

    Returns:
        The norm of the gradients of `parameters` before clipping, a scalar. It is NaN if a gradient of `not_clipped` is
        NaN or infinite. None after the earlier backward passes.
    """
    norm = None
    if accelerator.sync_gradients:
        norm = clip_gradients(accelerator, optimizer, parameters, max_norm)
        if others := [parameter.grad for parameter in not_clipped if parameter.grad is not None]:
            norm = norm + 0.0 * torch.nn.utils.get_total_norm(others)
    if norm is None or accelerator.scaler or norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm


def clip_gradients(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], limit: float
) -> torch.Tensor:
    """Scale the gradients down to the norm `limit` if their norm is larger. Return their norm before that: a scalar.

    On a CPU the gradients are not scaled if their norm is within the limit. Reading the norm costs nothing there, and
    scaling by 1 would be one more pass over the gradients.
    """
    if is_sharded(accelerator):
        return full_tensor(accelerator.clip_grad_norm_(parameters, limit))  # it adds up the norm over the ranks
    # only this optimizer: the gradients of another one may still be accumulating
    accelerator.unscale_gradients(optimizer)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # two thirds of the gradients are small vectors: concatenated, they need only one norm
    vectors = [gradient for gradient in gradients if gradient.ndim == 1]
    matrices = [gradient for gradient in gradients if gradient.ndim != 1]
    norm = torch.nn.utils.get_total_norm([torch.cat(vectors), *matrices] if vectors else matrices)
    if accelerator.device.type != "cpu":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif norm > limit:
        torch._foreach_mul_(gradients, float(limit / (norm + 1e-6)))  # as torch does, but not grouped by device
    return norm
