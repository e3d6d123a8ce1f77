"""Train an AutoencoderKL from scratch on photos.

The script has five parts: parse, data, model, loop, save.

python train_vae.py --data-dir training_data/corel/corel_all --output-dir vae_models
accelerate launch train_vae.py --data-dir training_data/corel/corel_all --output-dir vae_models
"""

from corel_diffusers.config.parsing import parse
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.files import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        arguments = parse(VAEArguments)

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from corel_diffusers.data.augmented_crops import random_crops
from corel_diffusers.data.batches import BatchPlan, preload, training_batches
from corel_diffusers.data.cache import process_share
from corel_diffusers.data.latents import cache_moments, measure_latent_scale
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import Pixels, cache_large_pixels, cache_pixels
from corel_diffusers.data.versions import STATISTICS_PHOTOS
from corel_diffusers.files import UserError, atomic_model_save, best_record, read_json, write_json
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.losses.vae import (
    add_adversarial_loss,
    controlled_kl_weight,
    discriminator_loss,
    kl_divergence,
    kl_warmup,
    reconstruction_loss,
)
from corel_diffusers.models.configs import check_size, downsample_factor, parameter_count
from corel_diffusers.models.discriminator import build_discriminator
from corel_diffusers.models.vae import VAEWithPosterior, build_vae
from corel_diffusers.plots import image_grid, plot_history, save_image, to_images
from corel_diffusers.runtime.compilation import Compilation
from corel_diffusers.runtime.cuda_graphs import capture_if_faster
from corel_diffusers.runtime.devices import to_device
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.runtime.randomness import StepRandom
from corel_diffusers.runtime.sharding import is_sharded
from corel_diffusers.training import advice
from corel_diffusers.training.checkpoints import Trained, load_checkpoint, save_checkpoint
from corel_diffusers.training.ema import build_ema, ema_weights
from corel_diffusers.training.history import open_history
from corel_diffusers.training.learning_rate import LearningRate
from corel_diffusers.training.length import RunLength, checkpoint_due, epochs_between_validations, samples_due
from corel_diffusers.training.metrics import RunningMean, log_validation, progress_bar, show_progress
from corel_diffusers.training.optimizers import CombinedOptimizer, build_optimizer, clip_gradients
from corel_diffusers.training.planning import plan_run
from corel_diffusers.training.presets import VAE_PRESETS
from corel_diffusers.training.resume import find_resume, mark_finished, run_settings
from corel_diffusers.training.run import explain_out_of_memory, print_data_and_model, start_run
from corel_diffusers.training.stopping import StopSignal, update_best_loss

PANELS = {
    # measured on full photos, with the posterior mean and the EMA weights
    "held-out photos": {"val_reconstruction": "reconstruction", "val_perceptual": "perceptual"},
    "PSNR (dB)": {"val_psnr": "held-out photos"},
    "KL (nats per photo)": {"val_kl": "held-out photos"},
    # measured on augmented photos, with drawn latents and the weights of each step: not comparable with those above
    "in training": {"reconstruction": "reconstruction", "perceptual": "perceptual"},
    "KL in training": {"kl": "augmented photos"},
    "adversarial": {"adversarial": "decoder", "discriminator": "discriminator"},
}
# shown in the progress bar and in panels of their own
TRAINING_METRICS = ("loss", "reconstruction", "perceptual", "kl")
# fraction of the run for which the discriminator trains before the adversarial loss starts
DISCRIMINATOR_LEAD = 0.1
# for a run that received a stop signal and has only seconds left; the statistics are measured again when the run ends
STATISTICS_PHOTOS_WHEN_STOPPED = 256


def main(flags: VAEArguments) -> None:
    began = time.monotonic()
    accelerator = start_run(flags)
    if is_sharded(accelerator):
        raise UserError(
            "--use_fsdp is for a UNet that is too large to train on one GPU: launch train_vae.py without it"
        )
    device = accelerator.device

    # data
    with accelerator.local_main_process_first():
        photos = load_photos(flags.photo_source, classes=flags.classes, max_train_samples=flags.max_train_samples)
        photos.pop("test", None)  # training never sees the test split, which `evaluate` reports on
    args = plan_run(flags, accelerator, photos, VAE_PRESETS, partial(trial_step, flags, accelerator), flags.size_px)
    size_px = args.size_px
    torch.manual_seed(args.seed)
    # the model is built before the photos are decoded, so that an invalid image size is an error at once
    vae = build_vae(args.config, size_px, args.latent_dim, args.downsample, args.attention)
    share = process_share(accelerator)
    photos, pixels = cache_pixels(photos, size_px, share)
    large_pixels = cache_large_pixels(photos, size_px, share) if args.crop_chance else pixels["train"]
    plan = BatchPlan.of(args, accelerator, len(pixels["train"]))
    settings = run_settings(args, photos, "vae", size_px=size_px, global_batch=plan.global_batch)
    checkpoint = find_resume(accelerator, args, settings)

    # model
    latent_shape = (vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    perceptual = build_perceptual(args, device)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    model, perceptual_pass = capture_training_passes(
        args,
        accelerator,
        VAEWithPosterior(vae, bool(args.adversarial_weight)),
        perceptual,
        *zero_batch(args.batch_size, size_px, vae),
    )
    optimizer = build_optimizer(
        args.optimizer, model, args.learning_rate, args.weight_decay, args.MUON_SCALE, model.ADAMW_LAYERS
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
    optimizer = accelerator.prepare(optimizer)
    # listed once: walking the modules is slower than the EMA update
    ema, parameters = build_ema(args, model), list(model.parameters())
    rate = LearningRate([part.optimizer for part in trained], args)
    try:
        check_size(size_px, 4 * downsample_factor(vae), "the UNet presets (they halve the latents twice)")
    except UserError as error:
        accelerator.print(f"notice: {error}, or use your own UNet config")
    print_data_and_model(
        accelerator, photos, size_px, f"VAE of {parameter_count(vae)}, latents {'x'.join(map(str, latent_shape))}"
    )

    # loop
    state = load_checkpoint(accelerator, checkpoint, trained, rate, ema)
    length = RunLength.of(args, plan, accelerator, state, began)
    history = open_history(accelerator, args, state, "train_vae.py", photos)
    kl_weight = torch.tensor(state.kl_weight or args.kl_weight, device=device)
    means, stop = RunningMean(state, device), StopSignal()
    validate_every = epochs_between_validations(args, plan, len(pixels["validation"]))
    compilation = Compilation(args, accelerator, model, state.step)
    arrays = pixels["train"].values, large_pixels.values
    batches = training_batches(plan, state.step, length.steps, args.num_workers, *preload(arrays, device))
    with progress_bar(plan, state, length, accelerator) as bar:
        while not length.reached(state):
            rate.set(state.step, length.total_steps(state))
            if not args.kl_target:
                warmup_steps = args.kl_warmup * plan.steps_per_epoch
                # the second value ends the warm-up after a third of the run at the latest
                warmup_step = max(state.step, 3 * length.fraction_done(state) * warmup_steps)
                kl_weight.fill_(kl_warmup(args.kl_weight, warmup_step, warmup_steps))
            # fraction of the run until the adversarial loss starts; not above 0 once it has started
            until_adversarial = args.adversarial_start - length.fraction_done(state)
            kl = 0.0
            for micro_step in range(args.grad_accum):
                rng = StepRandom(args.seed, state.step, plan.global_batch, plan.rows(micro_step))
                fitted, large = (to_device(values, device) for values in next(batches))
                jitter = to_device(args.colour_jitter * (2 * rng.uniform(2) - 1), device)
                # (B, 3, H, W)
                images = random_crops(large, fitted, rng.chance(args.crop_chance), rng.uniform(3), jitter)
                images = torch.where(to_device(rng.chance(0.5), device).view(-1, 1, 1, 1), images.flip(-1), images)
                with accelerator.accumulate(*(part.model for part in trained)):
                    with accelerator.autocast():
                        reconstruction, mean, logvar, last_layer_input = model(
                            images, to_device(rng.normal(*latent_shape), device)
                        )
                    terms = loss_terms(args, accelerator, perceptual_pass, images, reconstruction, mean, logvar)
                    loss = backward_loss = terms["reconstruction"] + args.perceptual_weight * terms.get("perceptual", 0)
                    if discriminator and until_adversarial <= 0:  # these gradients reach only the VAE
                        frozen_discriminator = accelerator.unwrap_model(discriminator).requires_grad_(False)
                        terms["adversarial"] = -frozen_discriminator(reconstruction).mean()
                        frozen_discriminator.requires_grad_(True)
                        loss_scale = (
                            accelerator.scaler.scale(torch.ones((), device=device)) if accelerator.scaler else 1.0
                        )
                        weight, last_layer = args.adversarial_weight, vae.decoder.conv_out
                        loss, backward_loss = add_adversarial_loss(
                            loss, terms["adversarial"], weight, reconstruction, last_layer, last_layer_input, loss_scale
                        )
                    loss = loss + kl_weight * terms["kl"]
                    accelerator.backward(backward_loss + kl_weight * terms["kl"])
                    # these gradients reach only the discriminator
                    if discriminator and until_adversarial <= DISCRIMINATOR_LEAD:
                        logits = discriminator(torch.cat([images, reconstruction.detach()])).float()
                        terms["discriminator"] = discriminator_loss(*logits.chunk(2))
                        accelerator.backward(terms["discriminator"])
                    if accelerator.sync_gradients:
                        clip_gradients(accelerator, optimizer, parameters, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                means.add(loss=loss, **terms)
                kl += terms["kl"].detach() / args.grad_accum
            if args.kl_target:
                kl_weight = controlled_kl_weight(kl_weight, accelerator.reduce(kl, "mean"), args.kl_target)
            if ema:
                ema.step(parameters)
            state.step += 1
            length.tick(state, accelerator)
            compilation.tick(state.step, length.total_steps(state) - state.step)
            show_progress(bar, plan, state, length, means, args)

            epoch, is_last_step = plan.epoch(state.step), length.reached(state)
            if is_last_step or plan.ends_epoch(state.step, validate_every):
                is_sample_step = samples_due(args, epoch, validate_every, length, state, history)
                with ema_weights(ema, model):
                    values = validate(args, accelerator, perceptual, vae, pixels["validation"])
                    is_lowest = update_best_loss(state, values["val_loss"])
                    # the validation loss cannot see what the discriminator improves, so then save the latest model
                    save_as_best = is_lowest or bool(discriminator and until_adversarial <= 0)
                    if save_as_best and accelerator.is_main_process:
                        with atomic_model_save(args.run_dir) as folder:
                            vae.save_pretrained(folder)
                    if is_sample_step and accelerator.is_main_process:
                        write_sample_grids(args, accelerator, vae, pixels["validation"], epoch)
                rate.validated(values["val_loss"])
                values = (
                    means.close(accelerator)
                    | values
                    | {"kl_weight": float(kl_weight), "learning_rate": rate.now, "published": save_as_best}
                )
                log_validation(
                    accelerator, args, plan, state, history, bar, values, is_sample_step, not_printed=TRAINING_METRICS
                )

            is_stopping = stop.received(accelerator, state)
            if is_stopping or is_last_step or checkpoint_due(args, plan, state, length):
                state.kl_weight = float(kl_weight)
                means.store(state, accelerator)
                save_checkpoint(accelerator, args, state, settings, trained, rate, ema)
                if accelerator.is_main_process:
                    target_lines = {"KL (nats per photo)": [(args.kl_target, "target")]} if args.kl_target else None
                    plot_history(history, PANELS, args.run_dir / "training_losses.png", target_lines)
            if is_stopping:
                break

    # save
    if accelerator.is_main_process and history:
        vae = AutoencoderKL.from_pretrained(args.run_dir).to(device, memory_format=torch.channels_last)
        num_photos = STATISTICS_PHOTOS_WHEN_STOPPED if stop.number else STATISTICS_PHOTOS
        mean, std = measure_latent_scale(
            cache_moments(vae, pixels["train"].evenly_spaced(num_photos), device, batch_size=args.batch_size)
        )
        write_json(
            args.run_dir / "config.json",
            read_json(args.run_dir / "config.json") | {"latents_mean": mean, "latents_std": std},
        )
        best = best_record(history)
        print(
            f"{args.run_dir} holds the VAE of epoch {best['epoch']}: "
            f"held-out PSNR {best['val_psnr']:.2f} dB, SSIM {best['val_ssim']:.3f}"
        )
        for line in advice.on_loss(history, "reconstruction", args) + advice.on_kl(
            history, args, latent_shape, mean_photo_psnr(pixels)
        ):
            print(f"notice: {line}")
        if not stop.number:
            mark_finished(args)
    # if one rank exits first, the launcher may kill the main process while it is writing
    accelerator.wait_for_everyone()
    accelerator.end_training()
    stop.exit(state)


def trial_step(
    args: VAEArguments,
    accelerator: Accelerator,
    config: str,
    size_px: tuple[int, int],
    batch_size: int,
    attention: str,
) -> Callable[[], None]:
    """Return a function that makes one training step of a new VAE on grey photos. It is used to time the step."""
    model = VAEWithPosterior(build_vae(config, size_px, args.latent_dim, args.downsample, attention)).to(
        accelerator.device
    )
    if args.gradient_checkpointing:
        model.vae.enable_gradient_checkpointing()
    perceptual = build_perceptual(args, accelerator.device)
    optimizer = build_optimizer(args.optimizer, model, 1e-4, args.weight_decay, args.MUON_SCALE, model.ADAMW_LAYERS)
    photos, noise = (values.to(accelerator.device) for values in zero_batch(batch_size, size_px, model.vae))
    model, perceptual = capture_training_passes(args, accelerator, model, perceptual, photos, noise, trial=True)

    def step() -> None:
        with accelerator.autocast():
            terms = loss_terms(args, accelerator, perceptual, photos, *model(photos, noise)[:3])
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
    noise = torch.zeros(batch_size, vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    return torch.zeros(batch_size, 3, *size_px).to(memory_format=torch.channels_last), noise


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
        return perceptual(reconstruction, reference)  # wrapped, so that `perceptual` itself still takes any batch size

    return model, capture_if_faster(
        args, accelerator, "" if trial else "perceptual loss", perceptual_pass, photos.clone().requires_grad_(), photos
    )


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
    terms = {"reconstruction": reconstruction_loss(reconstruction, photos, args.reconstruction)}
    if perceptual:
        with accelerator.autocast():
            terms["perceptual"] = perceptual(reconstruction, photos)
    return terms | {"kl": kl_divergence(mean, logvar).mean()}


@torch.no_grad()
def validate(
    args: VAEArguments,
    accelerator: Accelerator,
    perceptual: PerceptualLoss | None,
    vae: AutoencoderKL,
    pixels: Pixels,
) -> dict[str, float]:
    """Return the mean losses and metrics over the held-out photos, reconstructed from the posterior's mean.

    `val_loss` decides which epoch is the best. It is the loss with the final KL weight. With --kl-target, the KL term
    is log(KL / target) if the KL is above the target, and 0 otherwise. Without this rule, an epoch before the KL has
    come down to its target could look like the best.
    """
    sums: dict[str, float] = {}
    for start in range(0, len(pixels), args.batch_size):
        photos = pixels.batch(slice(start, start + args.batch_size)).to(accelerator.device)
        with accelerator.autocast():
            posterior = vae.encode(photos).latent_dist
            outputs = [
                values.float() for values in (vae.decode(posterior.mean).sample, posterior.mean, posterior.logvar)
            ]
        terms = loss_terms(args, accelerator, perceptual, photos, *outputs)
        image_pairs = (outputs[0].clamp(-1, 1) + 1) / 2, (photos + 1) / 2
        terms["psnr"] = peak_signal_noise_ratio(*image_pairs, data_range=1.0, dim=(1, 2, 3))
        terms["ssim"] = structural_similarity_index_measure(*image_pairs, data_range=1.0)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(photos)
    values = {f"val_{name}": value / len(pixels) for name, value in sums.items()}
    kl_term = (
        max(0.0, math.log(values["val_kl"] / args.kl_target)) if args.kl_target else args.kl_weight * values["val_kl"]
    )
    loss = values["val_reconstruction"] + args.perceptual_weight * values.get("val_perceptual", 0) + kl_term
    return broadcast_from_main(accelerator, {"val_loss": loss} | values)


@torch.no_grad()
def write_sample_grids(
    args: VAEArguments, accelerator: Accelerator, vae: AutoencoderKL, pixels: Pixels, epoch: int
) -> None:
    """Write two image grids of an epoch: held-out photos above their reconstructions, and decoded random latents.

    The random latents have the mean and the standard deviation of the photos' latents in each channel.
    """
    photos = pixels.evenly_spaced(8).batch(slice(None)).to(accelerator.device)
    with accelerator.autocast():
        latents = vae.encode(photos).latent_dist.mean
        random_latents = torch.randn(latents.shape, generator=torch.Generator().manual_seed(args.seed)).to(latents)
        random_latents = latents.mean((0, 2, 3), keepdim=True) + latents.std((0, 2, 3), keepdim=True) * random_latents
        reconstructions, samples = vae.decode(latents).sample, vae.decode(random_latents).sample
    name = f"epoch_{epoch:04d}.png"
    grid = image_grid(to_images(photos) + to_images(reconstructions), len(photos), ["photo", "reconstruction"])
    save_image(grid, args.run_dir / "reconstructions" / name)
    save_image(image_grid(to_images(samples), 4), args.run_dir / "samples" / name)


def mean_photo_psnr(pixels: dict[str, Pixels]) -> float:
    """Return the PSNR in dB of the mean training photo, measured on at most 1000 held-out photos.

    It is the PSNR of a VAE whose latents contain no information about the photo.
    """
    train, batch_size = pixels["train"], 256
    total = sum(
        train.batch(slice(start, start + batch_size)).double().sum(0) for start in range(0, len(train), batch_size)
    )
    mean, held_out = (
        (total / len(train) + 1) / 2,
        (pixels["validation"].evenly_spaced(1000).batch(slice(None)).double() + 1) / 2,
    )
    return float(peak_signal_noise_ratio(mean.expand_as(held_out), held_out, data_range=1.0, dim=(1, 2, 3)))


if __name__ == "__main__":
    with one_line_errors(), explain_out_of_memory(arguments):
        main(arguments)
