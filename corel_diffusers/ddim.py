"""DDIM at any number of steps."""

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class DDIM(DDIMScheduler):
    """diffusers' DDIM, where each step ends at the timestep at which the next one begins.

    The library's own ends it 1000 // steps further down. Where the steps do not divide 1000 its timesteps lie further apart than that, so
    noise is left after each step: at 600 steps the samples spread by 0.41 where the data spread by 0.30.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """At most as many steps as the schedule has timesteps, which are under 1000 where `build_sampler` leaves out the last ones.

        At some numbers of steps, 61 for one, the library's rounding places one more timestep, below 0: it is left out.
        """
        super().set_timesteps(min(num_inference_steps, self.config.num_train_timesteps), device)
        self.timesteps = self.timesteps[self.timesteps >= 0]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DDIMSchedulerOutput:
        """One step of Song et al. 2021 (arXiv:2010.02502, eq. 12 and 16), from x_t to x_s, a being `alphas_cumprod`:

        x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) e + sigma z, sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s).

        model_output, sample: (N, C, h, w). After the last timestep a_s is 1, and x_s is x_0.
        """
        later = self.timesteps[self.timesteps < timestep]
        now = self.alphas_cumprod[timestep]
        then = self.alphas_cumprod[later[0]] if len(later) else self.final_alpha_cumprod
        signal, noise = now.sqrt(), (1 - now).sqrt()
        kind = self.config.prediction_type
        if kind == "v_prediction":
            original, direction = signal * sample - noise * model_output, signal * model_output + noise * sample
        elif kind == "epsilon":
            original, direction = (sample - noise * model_output) / signal, model_output
        else:
            original, direction = model_output, (sample - signal * model_output) / noise
        spread = eta * ((1 - then) / (1 - now) * (1 - now / then)).clamp_min(0).sqrt()
        result = then.sqrt() * original + (1 - then - spread**2).clamp_min(0).sqrt() * direction
        if eta:
            result = result + spread * randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return DDIMSchedulerOutput(prev_sample=result, pred_original_sample=original)
