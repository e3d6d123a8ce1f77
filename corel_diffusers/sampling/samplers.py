"""The samplers: diffusers' schedulers with the options that a model needs. Add a sampler to the table SAMPLERS."""

from collections.abc import Callable
from typing import NamedTuple

from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from corel_diffusers.config.commands import Sampling
from corel_diffusers.files import UserError, first_line
from corel_diffusers.sampling.ddim import DDIM


class Sampler(NamedTuple):
    """A diffusers scheduler class, its default number of steps, and the options that it needs for a trained model."""

    scheduler: type[SchedulerMixin]
    default_steps: int
    options: Callable[[SchedulerMixin], dict[str, object]]


def set_sampler(pipe: DiffusionPipeline, args: Sampling) -> tuple[str, int]:
    """Give the pipeline the sampler of the flags. Return its name and its number of steps.

    Raises:
        UserError: the scheduler of the pipeline has a config that the sampler cannot take.
    """
    name = AUTO if args.sampler == "auto" else args.sampler
    kind = pipe.scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        hint = f"give one of {', '.join(PREDICTION_TYPES)} in its scheduler/scheduler_config.json"
        raise UserError(f"--pipeline: the prediction_type of its scheduler is {kind}: {hint}")
    try:
        pipe.scheduler = build_sampler(name, pipe.scheduler)
    except (TypeError, ValueError) as error:
        hint = "repair scheduler/scheduler_config.json in its folder"
        raise UserError(f"--pipeline: its scheduler cannot be used ({first_line(error)}): {hint}") from None
    return name, possible_steps(pipe.scheduler, args.steps or SAMPLERS[name].default_steps)


def build_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the sampler of this name for a model that was trained with `scheduler`."""
    sampler = SAMPLERS[name]
    return sampler.scheduler.from_config(scheduler.config, **sampler.options(scheduler))


def possible_steps(sampler: SchedulerMixin, steps: int) -> int:
    """Return the largest number of steps, at most `steps`, for which all timesteps lie in the schedule.

    At some numbers of steps, such as 61, the rounding of diffusers adds a timestep below 0. The last step would then
    bring the noise back.
    """
    for possible in range(min(steps, sampler.config.num_train_timesteps), 1, -1):
        sampler.set_timesteps(possible)
        if sampler.timesteps.min() >= 0:
            return possible
    return 1


def first_timestep_options(scheduler: SchedulerMixin) -> dict[str, object]:
    """Return options that let other samplers begin at the same timestep as DPM-Solver++.

    A model that predicts the noise needs them. To compute the photo from the noise, a sampler divides by
    sqrt(alphas_cumprod). At the last timesteps of the cosine schedule this is almost 0, so these timesteps are left out
    of the schedule.
    """
    lambda_min = dpm_solver_options(scheduler.config).get("lambda_min_clipped")
    if lambda_min is None or scheduler.config.prediction_type != "epsilon":
        return {}
    alphas_cumprod = scheduler.alphas_cumprod
    num_timesteps = int((0.5 * (alphas_cumprod / (1 - alphas_cumprod)).log() >= lambda_min).sum())
    return {"num_train_timesteps": num_timesteps, "trained_betas": scheduler.betas[:num_timesteps].tolist()}


def dpm_solver_options(config: dict) -> dict[str, object]:
    """Return the options of DPM-Solver++ for a model that was trained with a scheduler of this config.

    On the cosine schedule, the timesteps with log-SNR / 2 below -5.1 are left out, as diffusers advises. At these last
    timesteps, computing x_0 from the predicted noise divides by almost 0. A schedule with zero terminal SNR keeps all
    timesteps, because its model was trained to begin at pure noise.
    """
    keeps_all = config.get("rescale_betas_zero_snr") or config.get("beta_schedule", "linear") == "linear"
    return {} if keeps_all else {"lambda_min_clipped": -5.1}


SAMPLERS = {
    "ddpm": Sampler(DDPMScheduler, 1000, first_timestep_options),
    "ddim": Sampler(DDIM, 50, first_timestep_options),
    "dpm-solver++": Sampler(DPMSolverMultistepScheduler, 15, lambda scheduler: dpm_solver_options(scheduler.config)),
    "unipc": Sampler(UniPCMultistepScheduler, 15, first_timestep_options),
}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")  # of diffusers' schedulers
AUTO = "dpm-solver++"  # in 15 steps as near to the photos as DDIM in 50: benchmarks/results/sampling.md
