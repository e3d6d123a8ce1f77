"""The models of a VAE run: build them, and time one step of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from diffusers import AutoencoderKL

from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.cache import Share
from corel_diffusers.data.pixels import are_grey
from corel_diffusers.files import read_json
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.losses.vae import loss_terms
from corel_diffusers.models.configs import latent_shape
from corel_diffusers.models.discriminator import build_discriminator
from corel_diffusers.models.vae import VAEWithPosterior, build_vae
from corel_diffusers.runtime.cuda_graphs import capture_if_faster
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.training.checkpoints import Parts, Trained
from corel_diffusers.training.ema import build_ema
from corel_diffusers.training.learning_rate import LearningRate
from corel_diffusers.training.optimizers import CombinedOptimizer, build_optimizer


class VAEModels(NamedTuple):
    """The models of the run, and what trains them."""

    vae: AutoencoderKL
    model: torch.nn.Module  # the VAEWithPosterior of `vae`, prepared by accelerate
    discriminator: torch.nn.Module | None  # prepared by accelerate
    perceptual: PerceptualLoss | None
    perceptual_pass: Callable | None  # `perceptual`, for batches of the training size only
    optimizer: torch.optim.Optimizer  # of all models
    parameters: list[torch.nn.Parameter]  # of `model`
    discriminator_parameters: list[torch.nn.Parameter]
    parts: Parts


def build_models(args: VAEArguments, accelerator: Accelerator, vae: AutoencoderKL) -> VAEModels:
    """Build the models that train the VAE, their optimizer and the EMA."""
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    perceptual = build_perceptual(args, accelerator.device)
    model, perceptual_pass = capture_training_passes(
        args,
        accelerator,
        VAEWithPosterior(vae, bool(args.adversarial_weight)),
        perceptual,
        *zero_batch(args.batch_size, args.size_px, vae),
    )
    optimizer = build_optimizer(
        model=model, learning_rate=args.learning_rate, adamw_layers=model.ADAMW_LAYERS, **args.optimizer_options
    )
    model, discriminator = accelerator.prepare(model), build_discriminator() if args.adversarial_weight else None
    trained = [Trained("model", model, optimizer)]
    if discriminator:
        discriminator_optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=args.learning_rate, betas=(0.5, 0.9), fused=True
        )
        discriminator = accelerator.prepare(discriminator)
        trained.append(Trained("discriminator", discriminator, discriminator_optimizer))
        # both optimizers step together after both backward passes: the fp16 scale must not change between the passes
        optimizer = CombinedOptimizer(optimizer, discriminator_optimizer)
    rate = LearningRate([part.optimizer for part in trained], args)
    parts = Parts(trained, rate, build_ema(args, model))
    # listed once: walking the modules is slower than the EMA update
    parameters, others = list(model.parameters()), list(discriminator.parameters()) if discriminator else []
    optimizer = accelerator.prepare(optimizer)
    return VAEModels(vae, model, discriminator, perceptual, perceptual_pass, optimizer, parameters, others, parts)


def trains_grey(args: VAEArguments, accelerator: Accelerator, photos: DatasetDict, share: Share) -> bool:
    """Return whether the VAE has one channel: by the flags, as when the run began, or because all photos are grey."""
    if args.grey or args.no_grey:
        return args.grey
    file = args.run_dir / "run.json"
    began = read_json(file) if args.resume and accelerator.is_main_process and file.is_file() else None
    # runs of earlier versions had three channels
    channels = broadcast_from_main(accelerator, began and began.get("channels", 3))
    return channels == 1 if channels else are_grey(photos, share)


def trial_step(
    flags: VAEArguments,
    accelerator: Accelerator,
    config: str,
    size_px: tuple[int, int],
    batch_size: int,
    attention: str,
) -> Callable[[], None]:
    """Return a function that makes one training step of a new VAE on grey photos. It is used to time the step."""
    vae = build_vae(config, size_px, flags.latent_dim, flags.downsample, attention)
    if flags.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    model = VAEWithPosterior(vae).to(accelerator.device)
    perceptual = build_perceptual(flags, accelerator.device)
    optimizer = build_optimizer(
        model=model, learning_rate=1e-4, adamw_layers=model.ADAMW_LAYERS, **flags.optimizer_options
    )
    photos, noise = (values.to(accelerator.device) for values in zero_batch(batch_size, size_px, vae))
    model, perceptual = capture_training_passes(flags, accelerator, model, perceptual, photos, noise, trial=True)

    def step() -> None:
        with accelerator.autocast():
            terms = loss_terms(flags, accelerator, perceptual, photos, *model(photos, noise)[:3])
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_perceptual(args: VAEArguments, device: torch.device) -> PerceptualLoss | None:
    """Return the perceptual loss on the device, or None for --no-perceptual."""
    if not args.perceptual:
        return None
    return PerceptualLoss(args.perceptual_network).to(device, memory_format=torch.channels_last)


def zero_batch(batch_size: int, size_px: tuple[int, int], vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros in the shapes of the model's training inputs: photos (B, 3, H, W) and noise (B, C, h, w)."""
    photos = torch.zeros(batch_size, 3, *size_px).to(memory_format=torch.channels_last)
    return photos, torch.zeros(batch_size, *latent_shape(vae, size_px))


def capture_training_passes(
    args: VAEArguments,
    accelerator: Accelerator,
    model: VAEWithPosterior,
    perceptual: PerceptualLoss | None,
    photos: torch.Tensor,
    noise: torch.Tensor,
    trial: bool = False,
) -> tuple[VAEWithPosterior, Callable | None]:
    """Return the model and the perceptual loss, each as CUDA graphs if that is faster.

    The returned perceptual loss takes batches of the size of `photos` only. It is None without `perceptual`.

    Args:
        trial: do not print which of them became CUDA graphs.
    """
    model = capture_if_faster(args, accelerator, "" if trial else "VAE", model, photos, noise)
    if not perceptual:
        return model, None

    def perceptual_pass(reconstruction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return perceptual(reconstruction, reference)  # captured in its place: `perceptual` must take any batch size

    name = "" if trial else "perceptual loss"
    inputs = photos.clone().requires_grad_(), photos
    return model, capture_if_faster(args, accelerator, name, perceptual_pass, *inputs)
