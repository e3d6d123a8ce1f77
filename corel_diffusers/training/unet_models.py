"""The models of a UNet run: build them, and time one step of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from diffusers import AutoencoderKL, UNet2DModel

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.data.latent_set import LatentSet
from corel_diffusers.files import UserError
from corel_diffusers.losses.diffusion import denoising_loss
from corel_diffusers.models.configs import latent_shape
from corel_diffusers.models.unet import UNetForTraining, build_unet
from corel_diffusers.runtime.cuda_graphs import capture_if_faster
from corel_diffusers.runtime.sharding import is_sharded, unsharded_copy
from corel_diffusers.training.checkpoints import Parts, Trained
from corel_diffusers.training.ema import build_ema
from corel_diffusers.training.learning_rate import LearningRate
from corel_diffusers.training.optimizers import build_optimizer


class UNetModels(NamedTuple):
    """The models of the run, and what trains them."""

    vae: AutoencoderKL  # frozen
    unet: UNet2DModel  # the UNet of `full_model`, or else of `model`
    model: torch.nn.Module  # a UNetForTraining, prepared by accelerate
    full_model: UNetForTraining | None  # the unsharded copy of `model`, if that is sharded
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]  # of `model`
    parts: Parts

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, or None for a UNet without classes."""
        count = self.unet.config.num_class_embeds
        return count - 1 if count else None


def build_models(
    args: UNetArguments, accelerator: Accelerator, vae: AutoencoderKL, unet: UNet2DModel, latent_set: LatentSet
) -> UNetModels:
    """Build the model that trains the UNet, its optimizer and the EMA."""
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    num_crop_params, num_features = latent_set.crop_params.shape[2], latent_set.num_features
    model = UNetForTraining(unet, num_crop_params, num_features)
    inputs = zero_batch(args.batch_size, latent_set.latent_shape, num_crop_params)
    model = capture_if_faster(args, accelerator, "UNet", model, *inputs)
    full_model = unsharded_copy(model, accelerator.device) if is_sharded(accelerator) else None
    unet = (full_model or model).unet
    optimizer = build_optimizer(
        model=model, learning_rate=args.learning_rate, adamw_layers=model.ADAMW_LAYERS, **args.optimizer_options
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    rate = LearningRate([optimizer], args)
    parts = Parts([Trained("model", model, optimizer)], rate, build_ema(args, model))
    # listed once: walking the modules is slower than the EMA update
    parameters = list(model.parameters())
    return UNetModels(vae, unet, model, full_model, optimizer, parameters, parts)


def trial_step(
    flags: UNetArguments,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    config: str,
    size_px: tuple[int, int],
    batch_size: int,
    attention: str,
) -> Callable[[], None]:
    """Return a function that makes one training step of a new UNet for the latents of `vae`.

    The inputs are zeros. The function is used to time the step.
    """
    model = UNetForTraining(build_unet(config, size_px, vae, 1, attention=attention), 0, 0).to(accelerator.device)
    if flags.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(
        model=model, learning_rate=1e-4, adamw_layers=model.ADAMW_LAYERS, **flags.optimizer_options
    )
    shape = latent_shape(vae, size_px)
    inputs = [values.to(accelerator.device) for values in zero_batch(batch_size, shape, num_crop_params=0)]
    model = capture_if_faster(flags, accelerator, "", model, *inputs)

    def step() -> None:
        with accelerator.autocast():
            loss = denoising_loss(model(*inputs)[0], inputs[0]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero_batch(batch_size: int, latent_shape: tuple[int, int, int], num_crop_params: int) -> tuple[torch.Tensor, ...]:
    """Return zeros in the shapes of the model's training inputs: latents, timesteps, labels and crop parameters.

    Args:
        latent_shape: (C, h, w).
    """
    timesteps = torch.zeros(batch_size, dtype=torch.long)
    return (
        torch.zeros(batch_size, *latent_shape),
        timesteps,
        timesteps.clone(),
        torch.zeros(batch_size, num_crop_params),
    )


def classes_of_model(flags: UNetArguments, photos: DatasetDict, numbers: dict[str, int]) -> dict[str, int]:
    """Return the classes of the UNet, in the order of their labels: class name -> number in the data.

    It is empty for a model without classes.

    Args:
        numbers: class name -> number in the data, of all classes.

    Raises:
        UserError: the null label would never be trained.
    """
    names = photos["train"].features["label"].names
    if flags.unconditional or len(names) < 2:
        return {}
    if not flags.label_dropout:
        hint = "give --label-dropout 0.1, or --unconditional for a model without classes"
        raise UserError(f"--label-dropout 0: guidance needs the null label, but it would never be trained: {hint}")
    return {name: numbers[name] for name in names}
