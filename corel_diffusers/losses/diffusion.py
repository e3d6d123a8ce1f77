"""The diffusion process: noise, what the UNet predicts, the weight of its loss, and how timesteps are drawn.

`Diffusion` is what train_unet.py uses. The functions below it are pure, each with its equation.

Shapes: latents (B, C, h, w); one value per photo (B,).

Symbols: x_0 the clean latents, x_t the noisy latents of timestep t, e the noise, a the scheduler's alphas_cumprod of t.
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.runtime.randomness import StepRandom


@dataclass(frozen=True)
class Diffusion:
    """The diffusion process of a run.

    To train another process, change this class. The rest of the training code uses only its methods and its scheduler.
    """

    scheduler: DDPMScheduler  # the samplers are made from its config, and so is the scheduler of the pipeline
    args: UNetArguments

    @classmethod
    def of(cls, args: UNetArguments) -> "Diffusion":
        """Return the diffusion process that the flags describe."""
        scheduler = DDPMScheduler(
            beta_schedule="squaredcos_cap_v2" if args.schedule == "cosine" else "linear",
            prediction_type=args.prediction_type,
            rescale_betas_zero_snr=args.zero_terminal_snr,
            clip_sample=False,  # latents are not bounded by 1
            # samplers with few steps then begin at pure noise (Lin et al. 2023, arXiv:2305.08891)
            timestep_spacing="trailing",
        )
        return cls(scheduler, args)

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps. They are 0 (least noise) to num_timesteps - 1."""
        return self.scheduler.config.num_train_timesteps

    def draw_timesteps(self, rng: StepRandom) -> torch.Tensor:
        """Return a random timestep for each photo: (B,) int64."""
        if self.args.timesteps == "log-normal":
            return log_normal_timesteps(self.scheduler, rng.normal(), *self.args.log_normal)
        return rng.integers(self.num_timesteps)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the input of the UNet, x_t = sqrt(a) x_0 + sqrt(1 - a) e: (B, C, h, w)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def losses(
        self, model_pred: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the unweighted loss of each photo: (B,), in float32."""
        return denoising_loss(model_pred, prediction_target(self.scheduler, latents, noise, timesteps))

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | float:
        """Return the weight of each photo's loss: (B,), or 1 for all."""
        gamma = self.args.min_snr_gamma
        return min_snr_weight(self.scheduler, timesteps, gamma) if gamma else 1.0


def prediction_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return the target of the UNet for its input x_t = sqrt(a) x_0 + sqrt(1 - a) e: (B, C, h, w).

    It depends on the scheduler's prediction_type. "epsilon": e (Ho et al. 2020, eq. 14). "sample": x_0. "v_prediction":
    the velocity sqrt(a) e - sqrt(1 - a) x_0 (Salimans & Ho 2022, arXiv:2202.00512, section 4).
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents}[prediction_type]


def denoising_loss(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each photo: (B,), in float32."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


def signal_to_noise(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """Return the signal-to-noise ratio a / (1 - a) of each timestep: (B,) -> (B,).

    With zero terminal SNR it is 0 at the last timestep.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the weight of each photo's denoising loss: (B,) -> (B,) (Hang et al. 2023, arXiv:2303.09556).

    The weight is min(SNR, gamma) for a loss on x_0. For a loss on the noise, the weight is divided by SNR, and for
    a loss on the velocity by SNR + 1 (section 3.4). Without these weights, the gradients of different timesteps pull
    the model in different directions.

    With zero terminal SNR, sampling begins at pure noise, whose weight would be 0. The weight on x_0 is therefore
    min(SNR, gamma) + 1. For a loss on the velocity, all timesteps with an SNR of at most gamma then have the same
    weight.
    """
    snr = signal_to_noise(scheduler, timesteps)
    x0_weight = snr.clamp(max=gamma) + (1 if scheduler.config.rescale_betas_zero_snr else 0)
    divisor = {"epsilon": snr.clamp_min(1e-8), "sample": torch.ones_like(snr), "v_prediction": snr + 1}[
        scheduler.config.prediction_type
    ]
    return x0_weight / divisor


def log_normal_timesteps(scheduler: DDPMScheduler, normal: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Return timesteps whose log noise level ln sqrt((1 - a) / a) is close to mean + std * normal: (B,) -> (B,) int64.

    The model learns most at the noise levels around the mean, so they are drawn most often (Karras et al. 2022,
    arXiv:2206.00364, table 1).

    Args:
        normal: standard normal values.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(normal.device)
    log_noise_levels = 0.5 * ((1 - alphas_cumprod) / alphas_cumprod.clamp_min(1e-20)).log()
    return torch.searchsorted(log_noise_levels, mean + std * normal).clamp(max=len(log_noise_levels) - 1)
