"""The loss of the VAE: its terms as pure functions, each with its equation.

Shapes: images (B, 3, H, W) in [-1, 1]; latents (B, C, h, w).
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from corel_diffusers.config.vae import VAEArguments


def loss_terms(
    args: VAEArguments,
    accelerator: Accelerator,
    perceptual: Callable | None,
    photos: torch.Tensor,
    reconstruction: torch.Tensor,
    mean: torch.Tensor,
    logvar: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return the unweighted terms of the loss by name, each a scalar: reconstruction, perceptual and KL."""
    reconstruction = reconstruction.float()  # a trial step of planning gives it in half precision
    terms = {"reconstruction": reconstruction_loss(reconstruction, photos, args.reconstruction)}
    if perceptual:
        with accelerator.autocast():
            terms["perceptual"] = perceptual(reconstruction, photos)
    return terms | {"kl": kl_divergence(mean, logvar).mean()}


def weighted_sum(terms: dict[str, torch.Tensor | float], args: VAEArguments) -> torch.Tensor | float:
    """Return the weighted sum of the terms that depend on the reconstruction only: not the KL.

    With the adversarial loss, the gradient of this sum passes through the reconstruction alone. A term that depends on
    the posterior must be added as the KL is added in train_vae.py.
    """
    return terms["reconstruction"] + args.perceptual_weight * terms.get("perceptual", 0)


def reconstruction_loss(reconstruction: torch.Tensor, photos: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the mean of |x' - x| (kind "l1") or of (x' - x)^2 (kind "mse") over all values: a scalar."""
    return F.l1_loss(reconstruction, photos) if kind == "l1" else F.mse_loss(reconstruction, photos)


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of each photo in nats: (B,).

    It is 1/2 sum(mean^2 + exp(logvar) - 1 - logvar) (Kingma & Welling 2014, appendix B).
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Return the hinge loss of the discriminator D: a scalar.

    It is E max(0, 1 - D(x)) + E max(0, 1 + D(x')) for photos x and reconstructions x' (Lim & Ye 2017, arXiv:1705.02894,
    eq. 3).
    """
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def add_adversarial_loss(
    loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    adversarial_weight: float,
    reconstruction: torch.Tensor,
    last_layer: torch.nn.Conv2d,
    last_layer_input: torch.Tensor,
    loss_scale: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the total loss, and a second scalar to call backward on.

    The total loss is loss + adversarial_weight * `adaptive_weight` * adversarial_loss, detached. The second scalar
    has the same gradient as the total loss, with respect to the reconstruction.

    `adaptive_weight` needs the gradients of both losses with respect to the reconstruction, so they are computed here.
    The backward pass then starts at the reconstruction and runs through the VAE only.

    Args:
        last_layer, last_layer_input: see `adaptive_weight`.
        loss_scale: the factor of the fp16 gradient scaler. The gradients are computed with it, so that they do not
            underflow, and then divided by it. If they overflow, the gradient of the second scalar is infinite
            too. The scaler sees this and skips the step.
    """
    gradients = [
        torch.autograd.grad(loss_scale * term, reconstruction)[0] / loss_scale for term in (loss, adversarial_loss)
    ]
    weight = adversarial_weight * adaptive_weight(*gradients, last_layer, last_layer_input)
    return (
        (loss + weight * adversarial_loss).detach(),
        ((gradients[0] + weight * gradients[1]) * reconstruction).sum(),
    )


@torch.no_grad()
def adaptive_weight(
    reconstruction_grad: torch.Tensor,
    adversarial_grad: torch.Tensor,
    last_layer: torch.nn.Conv2d,
    last_layer_input: torch.Tensor,
) -> torch.Tensor:
    """Return |gradient of the reconstruction loss| / |gradient of the adversarial loss|: a scalar.

    Both gradients are taken with respect to the weights of the decoder's last layer (Esser et al. 2021,
    arXiv:2012.09841, eq. 7). With this weight both losses have gradients of the same size, whatever the scale of the
    discriminator. The result is at most 10^4, and 0 if an fp16 gradient has overflowed.

    Args:
        reconstruction_grad, adversarial_grad: (B, 3, H, W), the gradient of each loss with respect to the
            reconstruction.
        last_layer: the convolution with stride 1 that computed the reconstruction.
        last_layer_input: (B, D, H, W), the input of that convolution. The gradient with respect to the weights is
            computed from it and from the gradient with respect to the reconstruction, without a backward pass.
    """

    def weight_grad_norm(gradient: torch.Tensor) -> torch.Tensor:
        # the channels of a grey reconstruction are copies of the one output of the layer
        gradient = gradient.unflatten(1, (last_layer.out_channels, -1)).sum(2)
        return torch.nn.grad.conv2d_weight(
            last_layer_input, last_layer.weight.shape, gradient, padding=last_layer.padding
        ).norm()

    return (
        (weight_grad_norm(reconstruction_grad) / (weight_grad_norm(adversarial_grad) + 1e-4))
        .nan_to_num(nan=0.0, posinf=0.0)
        .clamp(max=1e4)
    )


def kl_warmup(weight: float, step: float, warmup_steps: int) -> float:
    """Return the KL weight at a step. It rises linearly from 0 to `weight` over `warmup_steps`."""
    return weight * min(1.0, step / warmup_steps) if warmup_steps else weight


def controlled_kl_weight(weight: torch.Tensor, kl: torch.Tensor, target: float, gain: float = 0.05) -> torch.Tensor:
    """Return the KL weight of the next step: w (kl / target)^gain. It brings the KL per photo to `target` nats.

    The weight w rises while the KL is above the target, and falls while it is below (similar to ControlVAE, Shao et al.
    2020, arXiv:2004.05988). The ratio kl / target is clamped to [1/3, 3] in each step, and w to [1e-9, 10]. All values
    stay on the device, so there is no synchronisation.
    """
    kl = kl.detach().float().nan_to_num(target)  # the step is skipped: the weight stays
    ratio = (kl / target).clamp(1 / 3, 3)
    return (weight * ratio**gain).clamp(1e-9, 10.0)
