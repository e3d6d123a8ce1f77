"""Train an AutoencoderKL from scratch on photos.

The script has five parts: start, data, models, loop, save.

python train_vae.py --data-dir training_data/corel/corel_all --output-dir vae_models
accelerate launch train_vae.py --data-dir training_data/corel/corel_all --output-dir vae_models
"""

from corel_diffusers.config.parsing import parse_script
from corel_diffusers.config.vae import VAEArguments

if __name__ == "__main__":
    arguments = parse_script(VAEArguments)

import math
import time
from functools import partial

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from diffusers import AutoencoderKL

from corel_diffusers import files, plots, saved_models
from corel_diffusers.data import aspect, augmented_crops, batches, latents, pixels, versions
from corel_diffusers.data.cache import process_share
from corel_diffusers.hub import upload
from corel_diffusers.losses import vae as losses
from corel_diffusers.models.configs import downsample_factor, latent_shape
from corel_diffusers.models.vae import build_vae
from corel_diffusers.runtime import compilation, devices
from corel_diffusers.sampling import previews
from corel_diffusers.training import (
    advice,
    checkpoints,
    history,
    initial_weights,
    intervals,
    metrics,
    planning,
    presets,
    resume,
    start,
)
from corel_diffusers.training.divergence import go_back, has_diverged
from corel_diffusers.training.ema import ema_weights
from corel_diffusers.training.optimizers import optimizer_step
from corel_diffusers.training.run import Run
from corel_diffusers.training.stopping import update_best_loss
from corel_diffusers.training.vae_models import VAEModels, build_models, trains_grey, trial_step
from corel_diffusers.training.vae_validation import validate

PANELS = {
    # measured on full photos, with the posterior mean and the EMA weights
    "held-out photos": {"val_reconstruction": "reconstruction", "val_perceptual": "perceptual"},
    "PSNR (dB)": {"val_psnr": "held-out photos"},
    "SSIM": {"val_ssim": "held-out photos"},
    "KL (nats per photo)": {"val_kl": "held-out photos"},
    # measured on augmented photos, with sampled latents and without the EMA: not comparable with those above
    "in training": {"reconstruction": "reconstruction", "perceptual": "perceptual"},
    "KL in training": {"kl": "augmented photos"},
    "adversarial": {"adversarial": "decoder", "discriminator": "discriminator"},
    "learning rate": {"learning_rate": "learning rate"},
}
# Not printed with a validation, because they are measured differently. They are in the bar and in their own panels.
TRAINING_METRICS = ("loss", "reconstruction", "perceptual", "kl")
# fraction of the run for which the discriminator trains before the adversarial loss starts
DISCRIMINATOR_LEAD = 0.1
# A stopped run may have only seconds left, so it measures the latent scale on this many photos. A resumed run measures
# it again on more photos when it ends.
STATISTICS_PHOTOS_WHEN_STOPPED = 256


def main(flags: VAEArguments) -> None:
    """Train a VAE as the flags say."""
    # start
    if flags.push_to_hub:
        upload.require_accepted_token()
    began = time.monotonic()
    accelerator = start.start_run(flags)
    photos, _ = start.load_training_photos(flags, accelerator)
    trial = partial(trial_step, flags, accelerator)
    args = planning.plan_run(flags, accelerator, photos, presets.VAE_PRESETS, trial, flags.size_px)
    with start.running(args, accelerator):
        run, *parts = set_up(args, accelerator, photos, began)
        with run.stop.listening():
            train(run, *parts)
            parts.clear()  # frees the models, see end_run
            start.end_run(run)


def set_up(
    args: VAEArguments, accelerator: Accelerator, photos: DatasetDict, began: float
) -> tuple[Run, VAEModels, dict[str, pixels.Pixels], pixels.Pixels]:
    """Return the run, at its beginning or resumed, its models, the photos, and the training photos in a larger size.

    Args:
        began: time.monotonic() at the start of the script.
    """
    # data
    torch.manual_seed(args.seed)
    # the model is built before the photos are decoded, so that an invalid image size is an error at once
    share = process_share(accelerator)
    grey = trains_grey(args, accelerator, photos, share)
    vae = build_vae(args.config, args.size_px, args.latent_dim, args.downsample, args.attention, grey)
    sizes_px = aspect.training_sizes(args, photos["train"], args.size_px, 4 * downsample_factor(vae), share)
    pixel_format = sizes_px[0], share, sizes_px[1:], vae.config.in_channels == 1
    photos, fitted = pixels.cache_pixels(photos, *pixel_format)
    large = pixels.cache_large_pixels(photos, *pixel_format) if args.crop_chance else fitted["train"]
    settings = {"size_px": args.size_px, "channels": vae.config.in_channels}
    run = resume.begin_or_resume(args, accelerator, photos, fitted, began, **settings)

    # models
    if args.init_from and not run.checkpoint:
        accelerator.print(initial_weights.load_initial_vae(vae, args.init_location))
    models = build_models(args, accelerator, vae)
    start.print_data_and_model(run, photos, vae, sizes_px, latent_shape(vae, sizes_px[0]))
    start.print_notices(accelerator, advice.on_latent_size(vae, args.size_px) + advice.on_grey(args, grey))
    if accelerator.is_main_process and not run.checkpoint:  # it opens photos, which can be large
        start.print_notices(accelerator, advice.on_borders(photos["train"]))
    checkpoints.require_space_for_run(run, models.parts)
    checkpoints.load(run, models.parts)
    history.open_run_dir(run, photos, [args.init_location], sizes_px=sizes_px, channels=vae.config.in_channels)
    run.validate_every = intervals.epochs_between_validations(args, run.plan, len(fitted["validation"]))
    return run, models, fitted, large


def train(run: Run, models: VAEModels, fitted: dict[str, pixels.Pixels], large: pixels.Pixels) -> None:
    """Train until the run is over or stopped, on photos at the training size and, larger, for crops."""
    args, accelerator, device = run.args, run.accelerator, run.accelerator.device
    kl_weight = torch.tensor(run.state.kl_weight or args.kl_weight, device=device)
    compiler = compilation.Compilation(args, accelerator, models.model, run.state.step)
    source = run.length.steps, args.num_workers, *batches.preload((fitted["train"].values, large.values), device)
    training_batches = batches.training_batches(run.plan, run.state.step, *source)

    # loop
    with metrics.progress_bar(run) as run.bar:
        while not run.is_over:
            models.parts.rate.set(run.state.step, run.total_steps, run.state.rate_factor)
            if not args.kl_target:
                kl_weight.fill_(kl_weight_of_step(run))
            # fraction of the run that is left before the adversarial loss starts; 0 or less after its start
            until_adversarial = args.adversarial_start - run.length.fraction_done(run.state)
            is_adversarial = bool(models.discriminator) and until_adversarial <= 0
            kl = 0.0
            for micro_step in range(args.grad_accum):
                rng = run.plan.random(run.state.step, micro_step)
                images = augmented_crops.augmented_photos(args, next(training_batches), rng, device)
                noise = devices.to_device(rng.normal(*latent_shape(models.vae, images.shape[-2:])), device)
                with accelerator.accumulate(*(part.model for part in models.parts.trained)):
                    terms, reconstruction = autoencoder_step(run, models, images, noise, kl_weight, is_adversarial)
                    if models.discriminator and until_adversarial <= DISCRIMINATOR_LEAD:
                        terms["discriminator"] = discriminator_step(run, models, images, reconstruction)
                    parameters = models.parameters, args.max_grad_norm, models.discriminator_parameters
                    norm = optimizer_step(accelerator, models.optimizer, *parameters)
                run.skipped.add(norm)
                run.means.add(**terms)
                kl += terms["kl"].detach() / args.grad_accum
            if args.kl_target:
                kl_weight = losses.controlled_kl_weight(kl_weight, accelerator.reduce(kl, "mean"), args.kl_target)
            if models.parts.ema:
                models.parts.ema.step(models.parameters)
            run.state.step += 1
            run.length.tick(run.state, accelerator)
            compiler.tick(run.state.step, run.total_steps - run.state.step)
            metrics.show_progress(run)
            if has_diverged(run, models.parts):
                go_back(run, models.parts)
                kl_weight.fill_(run.state.kl_weight)
                training_batches = batches.training_batches(run.plan, run.state.step, *source)
                continue

            is_last_step = run.is_over
            if is_last_step or run.plan.ends_epoch(run.state.step, run.validate_every):
                validate_and_save(run, models, fitted["validation"], kl_weight, is_adversarial)

            is_stopping = run.stop.received(accelerator, run.state)
            if is_stopping or is_last_step or intervals.checkpoint_due(run):
                run.state.kl_weight = float(kl_weight)
                checkpoints.save(run, models.parts)
                if accelerator.is_main_process:
                    lines = {"KL (nats per photo)": [(args.kl_target, "target")]} if args.kl_target else None
                    plots.plot_history(run.history, PANELS, args.run_dir / "training_losses.png", lines)
                    upload.push_so_far(args, checkpoints.find_checkpoints(args.run_dir)[-1])
            if is_stopping:
                break

    # save
    if accelerator.is_main_process and run.history:
        add_latent_scale(run, fitted)
        if args.push_to_hub and run.is_complete:
            upload.push(args.run_dir, args.hub_model_id, private=not args.hub_public)


def kl_weight_of_step(run: Run) -> float:
    """Return the weight of the KL term in this step: it rises to --kl-weight in --kl-warmup epochs."""
    warmup_steps = run.args.kl_warmup * run.plan.steps_per_epoch
    # with the second value, the warm-up takes at most a third of the run
    step = max(run.state.step, 3 * run.length.fraction_done(run.state) * warmup_steps)
    return losses.kl_warmup(run.args.kl_weight, step, warmup_steps)


def autoencoder_step(
    run: Run,
    models: VAEModels,
    images: torch.Tensor,
    noise: torch.Tensor,
    kl_weight: torch.Tensor,
    is_adversarial: bool,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run one forward and backward pass of the VAE.

    Args:
        images: (B, 3, H, W).
        noise: (B, C, h, w), standard normal.
        is_adversarial: whether the adversarial loss has started.

    Returns:
        The loss and its unweighted terms by name, each a scalar, and the reconstruction (B, 3, H, W).
    """
    args, accelerator = run.args, run.accelerator
    with accelerator.autocast():
        reconstruction, mean, logvar, last_layer_input = models.model(images, noise)
    terms = losses.loss_terms(args, accelerator, models.perceptual_pass, images, reconstruction, mean, logvar)
    loss = backward_loss = losses.weighted_sum(terms, args)
    if is_adversarial:  # the discriminator's weights must not get these gradients
        discriminator = accelerator.unwrap_model(models.discriminator).requires_grad_(False)
        terms["adversarial"] = -discriminator(reconstruction).mean()
        discriminator.requires_grad_(True)
        scale = accelerator.scaler.scale(torch.ones((), device=images.device)) if accelerator.scaler else 1.0
        loss, backward_loss = losses.add_adversarial_loss(
            loss,
            terms["adversarial"],
            args.adversarial_weight,
            reconstruction,
            models.vae.decoder.conv_out,
            last_layer_input,
            scale,
        )
    accelerator.backward(backward_loss + kl_weight * terms["kl"])
    return {"loss": loss + kl_weight * terms["kl"]} | terms, reconstruction


def discriminator_step(run: Run, models: VAEModels, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Run one forward and backward pass of the discriminator, and return its loss: a scalar.

    The gradients reach only the discriminator. Photos and reconstructions: (B, 3, H, W).
    """
    logits = models.discriminator(torch.cat([images, reconstruction.detach()])).float()
    loss = losses.discriminator_loss(*logits.chunk(2))
    run.accelerator.backward(loss)
    return loss


def validate_and_save(
    run: Run, models: VAEModels, held_out: pixels.Pixels, kl_weight: torch.Tensor, is_adversarial: bool
) -> None:
    """Validate with the EMA weights and log the metrics. Save the VAE if it is the best one so far.

    Args:
        is_adversarial: whether the adversarial loss has started. The validation loss cannot see what the discriminator
            improves, so the latest VAE is then saved.
    """
    args, accelerator, is_sample_step = run.args, run.accelerator, intervals.samples_due(run) or run.is_over
    with ema_weights(models.parts.ema, models.model):
        values = validate(args, accelerator, models.perceptual, models.vae, held_out)
        is_finite = math.isfinite(values["val_loss"])
        save_as_best = update_best_loss(run.state, values["val_loss"]) or (is_adversarial and is_finite)
        if accelerator.is_main_process and save_as_best:
            with saved_models.atomic_model_save(args.run_dir) as folder:
                models.vae.save_pretrained(folder)
        if accelerator.is_main_process and is_sample_step:
            grids = previews.vae_grids(accelerator, models.vae, held_out, args.seed)
            for name, grid in zip(("reconstructions", "samples"), grids, strict=True):
                metrics.save_grid(run, name, grid)
    rate = models.parts.rate
    rate.validated(values["val_loss"])
    more = {"kl_weight": float(kl_weight), "learning_rate": rate.now, "published": save_as_best}
    values = run.means.close(accelerator) | values | more
    metrics.log_validation(run, values, is_sample_step, not_printed=TRAINING_METRICS)


def add_latent_scale(run: Run, fitted: dict[str, pixels.Pixels]) -> None:
    """Measure the scale of the latents of the saved VAE, write it to its config, and print the quality of the VAE."""
    args, device = run.args, run.accelerator.device
    vae = AutoencoderKL.from_pretrained(args.run_dir).to(device, memory_format=torch.channels_last)
    num_photos = versions.STATISTICS_PHOTOS if run.is_complete else STATISTICS_PHOTOS_WHEN_STOPPED
    photos = fitted["train"].evenly_spaced(num_photos)
    moments = latents.cache_moments(vae, photos, device, batch_size=args.batch_size)
    measured = latents.measure_latents(moments)
    config = args.run_dir / "config.json"
    files.write_json(config, files.read_json(config) | {"latents_mean": measured.mean, "latents_std": measured.std})
    saved_models.update_manifest(config)
    best = files.best_record(run.history)
    print(
        f"{args.run_dir} holds the VAE of epoch {best['epoch']}: "
        f"held-out PSNR {best['val_psnr']:.2f} dB, SSIM {best['val_ssim']:.3f}"
    )
    print(f"curves: {args.run_dir / 'training_losses.png'}")
    if (args.run_dir / "reconstructions").is_dir():  # a run that was stopped early has none
        print(f"photos over their reconstructions: {args.run_dir / 'reconstructions'}")
    shape = latent_shape(vae, args.size_px)
    mean_photo_psnr = advice.mean_photo_psnr(fitted["train"], fitted["validation"])
    start.print_notices(run.accelerator, advice.on_loss(run.history, "reconstruction", args))
    start.print_notices(run.accelerator, advice.on_kl(run.history, args, shape, mean_photo_psnr))
    start.print_notices(run.accelerator, advice.on_channels(measured.kl))


if __name__ == "__main__":
    start.run_script(main, arguments)
