"""Train a UNet2DModel from scratch in the latent space of a VAE, and save both as a pipeline.

The script has five parts: start, data, models, loop, save.

python train_unet.py --vae-checkpoint vae_models --image-dir training_data/corel/corel_all --output-dir diffusion_models
accelerate launch train_unet.py --vae-checkpoint vae_models --image-dir training_data/corel/corel_all
"""

from corel_diffusers.config.parsing import parse_script
from corel_diffusers.config.unet import UNetArguments

if __name__ == "__main__":
    arguments = parse_script(UNetArguments)

import time
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from diffusers import AutoencoderKL, DiffusionPipeline

from corel_diffusers import files, plots, saved_models
from corel_diffusers.data import aspect, latents, pixels
from corel_diffusers.data.cache import process_share
from corel_diffusers.data.latent_set import LatentSet
from corel_diffusers.evaluation.judge import SampleJudge
from corel_diffusers.evaluation.vae_fit import print_vae_fit
from corel_diffusers.hub import cards, upload
from corel_diffusers.losses.alignment import alignment_loss
from corel_diffusers.losses.diffusion import Diffusion
from corel_diffusers.models.configs import trained_size_px
from corel_diffusers.models.unet import build_unet, size_multiple
from corel_diffusers.runtime import compilation, devices, randomness
from corel_diffusers.sampling import previews
from corel_diffusers.sampling.samplers import AUTO, build_sampler
from corel_diffusers.training import advice, checkpoints, history, intervals, metrics, planning, presets, resume, start
from corel_diffusers.training.divergence import go_back, has_diverged
from corel_diffusers.training.ema import ema_weights
from corel_diffusers.training.gauge import GAUGE, PANEL, OverfittingGauge, first_copy_lines, record_validation
from corel_diffusers.training.guide import Guide
from corel_diffusers.training.initial_weights import load_initial_unet
from corel_diffusers.training.optimizers import optimizer_step
from corel_diffusers.training.run import Run
from corel_diffusers.training.stopping import stop_reason
from corel_diffusers.training.unet_models import UNetModels, build_models, classes_of_model, trial_step
from pipeline import CorelPipeline

PANELS = {
    "denoising loss at fixed noise": {"seen_loss": "training photos", "val_loss": "held-out photos"},
    "denoising loss in training": {"loss": "sampled latents, without EMA"},
    GAUGE: PANEL,
    "copies of training photos": {"copies_pixels": "in pixels", "copies_features": "in features"},
    "KID x1000 of a few samples": {"kid_e3": "against held-out photos"},
    "learning rate": {"learning_rate": "learning rate"},
}
# The training loss is not printed beside the other losses, because it is measured on latents with the posterior's
# noise. It is in the progress bar and in its own panel of the plot.
TRAINING_METRICS = ("loss",)


class Validation(NamedTuple):
    """What a validation uses."""

    overfitting: OverfittingGauge
    pipe: CorelPipeline  # holds the UNet in training
    guide: Guide
    judge: SampleJudge | None  # for --evaluate-every


def main(flags: UNetArguments) -> None:
    """Train a UNet as the flags say."""
    # start
    if flags.push_to_hub:
        upload.require_accepted_token()
    began = time.monotonic()
    accelerator = start.start_run(flags)
    vae = latents.load_vae(flags.vae_location).to(accelerator.device)
    size_px = flags.size_px or trained_size_px(vae)
    photos, class_numbers = start.load_training_photos(flags, accelerator)
    classes = classes_of_model(flags, photos, class_numbers)
    trial = partial(trial_step, flags, accelerator, vae)
    args = planning.plan_run(flags, accelerator, photos, presets.UNET_PRESETS, trial, size_px)
    with start.running(args, accelerator):
        run, *parts = set_up(args, accelerator, vae, photos, classes, size_px, began)
        with run.stop.listening():
            train(run, *parts)
            parts.clear()  # frees the models, see end_run
            start.end_run(run)


def set_up(
    args: UNetArguments,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    photos: DatasetDict,
    classes: dict[str, int],
    size_px: tuple[int, int],
    began: float,
) -> tuple[Run, UNetModels, Diffusion, LatentSet, Validation]:
    """Return the run, at its beginning or resumed, its models, and what its steps and its validations use.

    Args:
        classes: class name -> number of the class in the data, in the order of the labels. Empty without classes.
        size_px: the image size (height, width).
        began: time.monotonic() at the start of the script.
    """
    # data
    torch.manual_seed(args.seed)
    # the model is built before the photos are decoded, so that an invalid image size is an error at once
    share = process_share(accelerator)
    sizes_px = aspect.training_sizes(args, photos["train"], size_px, size_multiple(args.config, vae), share)
    unet = build_unet(args.config, sizes_px[0], vae, len(classes) or None, args.dropout, args.attention)
    pixel_format = sizes_px[0], share, sizes_px[1:], vae.config.in_channels == 1
    photos, fitted = pixels.cache_pixels(photos, *pixel_format)
    run = resume.begin_or_resume(args, accelerator, photos, fitted, began, size_px=size_px, **latents.vae_keys(vae))
    large = pixels.cache_large_pixels(photos, *pixel_format) if args.views else None
    latent_set = LatentSet.of(args, vae, photos, fitted, large, unet, share)
    print_vae_fit(run, vae, photos, fitted["validation"], latent_set.moments["validation"], share)

    # models
    diffusion = Diffusion.of(args)
    if args.init_from and not run.checkpoint:
        accelerator.print(load_initial_unet(unet, args.init_location, list(classes), vae))
    models = build_models(args, accelerator, vae, unet, latent_set)
    validation = build_validation(run, models, diffusion, latent_set, fitted, classes)
    start.print_data_and_model(run, photos, models.unet, sizes_px, latent_set.latent_shape)
    checkpoints.require_space_for_run(run, models.parts)
    checkpoints.load(run, models.parts)
    models_before, vae_run = [args.vae_location, args.init_location], cards.describe_vae(args.vae_location)
    history.open_run_dir(run, photos, models_before, vae=vae_run, sizes_px=sizes_px)
    run.state.stop_reason = stop_reason(args, run.state, run.history)
    run.validate_every = intervals.epochs_between_validations(args, run.plan, validation.overfitting.forward_passes)
    return run, models, diffusion, latent_set, validation


def train(run: Run, models: UNetModels, diffusion: Diffusion, latent_set: LatentSet, validation: Validation) -> None:
    """Train until the run is over or stopped, then complete the pipeline in the run's folder."""
    args, accelerator = run.args, run.accelerator
    compiler = compilation.Compilation(args, accelerator, models.model, run.state.step)
    source = run.length.steps, accelerator.device
    training_batches = latent_set.batches(args, run.plan, run.state.step, *source)

    # loop
    with metrics.progress_bar(run) as run.bar:
        while not run.is_over and not run.state.stop_reason:
            models.parts.rate.set(run.state.step, run.total_steps, run.state.rate_factor)
            for micro_step in range(args.grad_accum):
                rng = run.plan.random(run.state.step, micro_step, accelerator.device)
                batch = [devices.to_device(values, accelerator.device) for values in next(training_batches)]
                with accelerator.accumulate(models.model):
                    loss = denoising_step(run, models, diffusion, latent_set, batch, rng)
                    norm = optimizer_step(accelerator, models.optimizer, models.parameters, args.max_grad_norm)
                run.skipped.add(norm)
                run.means.add(loss=loss)
            if models.parts.ema:
                models.parts.ema.step(models.parameters)
            run.state.step += 1
            run.length.tick(run.state, accelerator)
            compiler.tick(run.state.step, run.total_steps - run.state.step)
            metrics.show_progress(run)
            is_snapshot = validation.guide.due(run.state.step)
            if has_diverged(run, models.parts, is_snapshot):
                go_back(run, models.parts)
                training_batches = latent_set.batches(args, run.plan, run.state.step, *source)
                continue

            if is_snapshot:
                with ema_weights(models.parts.ema, models.model, models.full_model):
                    if accelerator.is_main_process:
                        validation.guide.keep(run.state.step)
            is_last_step = run.is_over
            if is_last_step or run.plan.ends_epoch(run.state.step, run.validate_every):
                validate_and_save(run, models, diffusion, validation)
                run.state.stop_reason = stop_reason(args, run.state, run.history)

            is_stopping = run.stop.received(accelerator, run.state)
            if is_stopping or is_last_step or run.state.stop_reason or intervals.checkpoint_due(run):
                checkpoints.save(run, models.parts)
                if accelerator.is_main_process:
                    lines = first_copy_lines(run.history)
                    plots.plot_history(run.history, PANELS, args.run_dir / "loss_history.png", lines)
                    cards.write_card(args.run_dir, args.hub_model_id)
                    upload.push_so_far(args, checkpoints.find_checkpoints(args.run_dir)[-1])
            if is_stopping:
                break

    # save
    if accelerator.is_main_process and run.history:
        write_samples_and_card(run)
        if args.push_to_hub and run.is_complete:
            upload.push(args.run_dir, args.hub_model_id, private=not args.hub_public)


def build_validation(
    run: Run,
    models: UNetModels,
    diffusion: Diffusion,
    latent_set: LatentSet,
    fitted: dict[str, pixels.Pixels],
    classes: dict[str, int],
) -> Validation:
    """Build what a validation uses. Call it after the models are built.

    Loading the judge's network draws from the global random generator. Before the models are built, this would change
    their initial weights.

    Args:
        classes: see `set_up`.
    """
    vae, labels = models.vae, latent_set.labels
    judge = None
    if run.args.evaluate_every and run.accelerator.is_main_process:
        judge = SampleJudge.of(vae, fitted, torch.from_numpy(labels["validation"]), run.args.mixed_precision)
    sampler, sizes = build_sampler(AUTO, diffusion.scheduler), fitted["train"].count_by_size()
    names = {str(label): name for label, name in enumerate(classes)} or None
    numbers = {str(label): number for label, number in enumerate(classes.values())} or None
    return Validation(
        OverfittingGauge.of(vae, latent_set.moments, labels, bool(classes), diffusion),
        CorelPipeline(vae, models.unet, sampler, names, class_numbers=numbers, image_sizes=sizes),
        Guide(run.args.run_dir, models.unet, run.plan.global_batch),
        judge,
    )


def denoising_step(
    run: Run,
    models: UNetModels,
    diffusion: Diffusion,
    latent_set: LatentSet,
    batch: list[torch.Tensor],
    rng: randomness.StepRandom,
) -> torch.Tensor:
    """Run one forward and backward pass of the UNet, and return the unweighted denoising loss: a scalar.

    Args:
        batch: moments (B, 2C, h, w), labels (B,), crop parameters (B, P) and features (B, F, h', w').
    """
    args, accelerator = run.args, run.accelerator
    moments, labels, crop_params, target_features = batch
    posterior_noise, noise = (rng.normal(moments.shape[1] // 2, *moments.shape[2:]) for _ in range(2))
    clean = latents.scale_latents(latents.sample_posterior(moments, posterior_noise), models.vae)  # (B, C, h, w)
    timesteps = diffusion.draw_timesteps(rng)
    if models.null_label is not None:
        labels = torch.where(rng.chance(args.label_dropout), models.null_label, labels)
    with accelerator.autocast():
        model_pred, predicted_features = models.model(
            diffusion.add_noise(clean, noise, timesteps), timesteps, labels, crop_params
        )
    losses = diffusion.losses(model_pred, clean, noise, timesteps)  # (B,)
    total_loss = (diffusion.weights(timesteps) * losses).mean()
    if args.align_weight:
        scale = latent_set.feature_mean, latent_set.feature_std
        total_loss = total_loss + args.align_weight * alignment_loss(predicted_features, target_features, *scale).mean()
    accelerator.backward(total_loss)
    return losses.mean()


def validate_and_save(run: Run, models: UNetModels, diffusion: Diffusion, validation: Validation) -> None:
    """Validate with the EMA weights and log the metrics. Save the pipeline if it is the best one so far."""
    pipe, judge = validation.pipe, validation.judge
    args, accelerator, is_sample_step = run.args, run.accelerator, intervals.samples_due(run)
    with ema_weights(models.parts.ema, models.model, models.full_model):
        values = validation.overfitting.measure(models.unet, diffusion, accelerator)
        save_as_best = record_validation(run, values)
        if accelerator.is_main_process:
            pipe.register_modules(guide=validation.guide.of(run.state.step))
            if save_as_best:
                with saved_models.atomic_model_save(args.run_dir) as folder:
                    pipe.save_pretrained(folder)
            if is_sample_step:
                with accelerator.autocast():
                    grid = previews.sample_grid(pipe, args.seed, num_samples=12)
                metrics.save_grid(run, "samples", grid)
        if judge and run.epoch % args.evaluate_every < run.validate_every:
            values |= judge.judge(pipe, args.seed, accelerator)
    rate = models.parts.rate
    rate.validated(values["val_loss"])
    values = run.means.close(accelerator) | values | {"learning_rate": rate.now, "published": save_as_best}
    metrics.log_validation(run, values, is_sample_step, not_printed=TRAINING_METRICS)


def write_samples_and_card(run: Run) -> None:
    """Write a grid of samples of the pipeline that is saved as best, and the model card. Print its held-out loss."""
    args, best = run.args, files.best_record(run.history)
    epochs = f"epoch {best['epoch']}, out of {run.history[-1]['epoch']} so far"
    epochs += f" ({run.state.stop_reason})" if run.state.stop_reason else ""
    print(f"{args.run_dir} holds the pipeline of {epochs}: held-out loss {best['val_loss']:.4f}")
    start.print_notices(run.accelerator, advice.on_loss(run.history, "loss", args))
    # loaded as any user loads it
    pipe = DiffusionPipeline.from_pretrained(args.run_dir, trust_remote_code=True).to(run.accelerator.device)
    plots.save_image(previews.sample_grid(pipe, args.seed, num_samples=36), args.run_dir / "grid.png")
    cards.write_card(args.run_dir, args.hub_model_id)
    print(f"samples: {args.run_dir / 'grid.png'}; curves: loss_history.png")


if __name__ == "__main__":
    start.run_script(main, arguments)
