"""The training mathematics as pure functions, each with its equation.

Shapes: pictures (B, 3, H, W) in [-1, 1]; latents (B, C, h, w); one value a photo (B,).
"""

import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F


def reconstruction_loss(reconstruction: torch.Tensor, photo: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean |x' - x| ("l1") or mean (x' - x)^2 ("mse") over all values -> scalar."""
    return F.l1_loss(reconstruction, photo) if kind == "l1" else F.mse_loss(reconstruction, photo)


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each photo in nats: 1/2 sum(mean^2 + exp(logvar) - 1 - logvar) -> (B,).

    Kingma & Welling 2014, appendix B.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def discriminator_loss(on_photos: torch.Tensor, on_reconstructions: torch.Tensor) -> torch.Tensor:
    """Hinge: E max(0, 1 - D(x)) + E max(0, 1 + D(x')) -> scalar (Lim & Ye 2017, arXiv:1705.02894, eq. 3)."""
    return F.relu(1 - on_photos).mean() + F.relu(1 + on_reconstructions).mean()


def with_adversarial(
    loss: torch.Tensor,
    adversarial: torch.Tensor,
    strength: float,
    reconstruction: torch.Tensor,
    last_layer: torch.nn.Conv2d,
    drawn_from: torch.Tensor,
    loss_scale: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss + strength * `adaptive_weight` * adversarial, and a scalar that has its gradient at the reconstruction: to go backward from.

    Both terms' gradients are needed at the reconstruction to weigh them; backward from there is one pass through the decoder, and none
    through the perceptual network and the discriminator again. loss_scale: what fp16 losses are multiplied by, so that their gradients
    do not vanish on the way; where they overflow, so does the second scalar's, and the scaler skips the step.
    """
    pulls = [torch.autograd.grad(loss_scale * term, reconstruction)[0] / loss_scale for term in (loss, adversarial)]
    weight = strength * adaptive_weight(*pulls, last_layer, drawn_from)
    return (loss + weight * adversarial).detach(), ((pulls[0] + weight * pulls[1]) * reconstruction).sum()


@torch.no_grad()
def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.nn.Conv2d, drawn_from: torch.Tensor
) -> torch.Tensor:
    """|grad reconstruction| / |grad adversarial| at the decoder's last weights (Esser et al. 2021, arXiv:2012.09841, eq. 7) -> scalar.

    Both terms then pull equally hard, whatever the discriminator's scale. Clamped to 10^4; 0 where fp16 has overflowed.

    reconstruction, adversarial: each term's gradient at the reconstructions, (B, 3, H, W), which the last layer, a convolution with
    stride 1, made of `drawn_from` (B, D, H, W): from there its weights' gradients are one product.
    """

    def pull(gradient: torch.Tensor) -> torch.Tensor:
        return torch.nn.grad.conv2d_weight(drawn_from, last_layer.weight.shape, gradient, padding=last_layer.padding).norm()

    return (pull(reconstruction) / (pull(adversarial) + 1e-4)).nan_to_num(nan=0.0, posinf=0.0).clamp(max=1e4)


def kl_warmup(weight: float, step: int, warmup_steps: int) -> float:
    """The KL weight at a step: rises in a line from 0 to `weight` over the warm-up."""
    return weight * min(1.0, step / warmup_steps) if warmup_steps else weight


def controlled_kl_weight(weight: torch.Tensor, kl: torch.Tensor, target: float, gain: float = 0.05) -> torch.Tensor:
    """The KL weight of the next step, so that the KL per photo comes to `target` nats: w <- w (kl / target)^gain, clamped.

    An integral controller on log w, after Shao et al. 2020 (ControlVAE, arXiv:2004.05988), which controls the weight likewise.
    The ratio is clamped to [1/3, 3] a step, w to [1e-9, 10]. Stays on the device: no synchronisation.
    """
    ratio = (kl.detach().float() / target).clamp(1 / 3, 3)
    return (weight * ratio**gain).clamp(1e-9, 10.0)


def prediction_target(scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet is to predict from x_t = sqrt(a) x_0 + sqrt(1 - a) e, by the scheduler's prediction_type.

    "epsilon": e (Ho et al. 2020, eq. 14). "sample": x_0. "v_prediction": sqrt(a) e - sqrt(1 - a) x_0 (Salimans & Ho 2022,
    arXiv:2202.00512, section 4).
    """
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents}[kind]


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each photo -> (B,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def signal_to_noise(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """a / (1 - a) of each timestep, (B,) -> (B,); 0 at the last one with zero terminal SNR."""
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return kept / (1 - kept)


def min_snr_weight(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of each photo's denoising loss, (B,) -> (B,): min(SNR, gamma) for the loss on x_0 (Hang et al. 2023, arXiv:2303.09556).

    The same loss through the noise is divided by SNR, through the velocity by SNR + 1 (section 3.4). Timesteps that are almost clean
    and those that are almost noise then no longer pull against those in which pictures take shape. With zero terminal SNR it is
    min(SNR, gamma) + 1, since sampling begins at pure noise, which would have no weight: of the velocity's loss all timesteps up to gamma
    then count alike.
    """
    snr = signal_to_noise(scheduler, timesteps)
    on_photo = snr.clamp(max=gamma) + (1 if scheduler.config.rescale_betas_zero_snr else 0)
    divisor = {"epsilon": snr.clamp_min(1e-8), "sample": torch.ones_like(snr), "v_prediction": snr + 1}[scheduler.config.prediction_type]
    return on_photo / divisor


def log_normal_timesteps(scheduler: DDPMScheduler, normal: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Timesteps whose log noise level ln sqrt((1 - a) / a) is about mean + std * normal, (B,) -> (B,) int64.

    Karras et al. 2022 (arXiv:2206.00364), table 1: noise levels where most is to be learned are drawn most often.
    """
    kept = scheduler.alphas_cumprod.to(normal.device)
    levels = 0.5 * ((1 - kept) / kept.clamp_min(1e-20)).log()
    return torch.searchsorted(levels, mean + std * normal).clamp(max=len(levels) - 1)
