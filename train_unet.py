"""Train a UNet2DModel from scratch in the latent space of a VAE, and save both as a pipeline.

The script has five parts: parse, data, model, loop, save.

python train_unet.py --vae-checkpoint vae_models --image-dir training_data/corel/corel_all --output-dir diffusion_models
accelerate launch train_unet.py --vae-checkpoint vae_models --image-dir training_data/corel/corel_all
"""

from corel_diffusers.config.parsing import parse
from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.files import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        arguments = parse(UNetArguments)

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from corel_diffusers import hub
from corel_diffusers.data.augmented_crops import AugmentedCrops, pick_versions
from corel_diffusers.data.batches import BatchPlan, preload, training_batches
from corel_diffusers.data.cache import process_share
from corel_diffusers.data.features import cache_features, feature_scale
from corel_diffusers.data.latents import (
    cache_moments,
    config_key,
    load_vae,
    sample_posterior,
    scale_key,
    scale_latents,
    weights_key,
)
from corel_diffusers.data.photos import load_numbered_photos
from corel_diffusers.data.pixels import cache_large_pixels, cache_pixels, evenly_spaced
from corel_diffusers.data.training_photos import count_trained_on, training_photos
from corel_diffusers.evaluation.judge import SampleJudge
from corel_diffusers.evaluation.reconstruction import reconstruction_limit
from corel_diffusers.files import UserError, atomic_model_save, best_record, read_json
from corel_diffusers.losses.alignment import alignment_loss
from corel_diffusers.losses.diffusion import denoising_loss, log_normal_timesteps, min_snr_weight, prediction_target
from corel_diffusers.models.configs import downsample_factor, parameter_count
from corel_diffusers.models.unet import UNetForTraining, build_unet, inner_grid
from corel_diffusers.plots import image_grid, plot_history, save_image
from corel_diffusers.runtime.compilation import Compilation
from corel_diffusers.runtime.cuda_graphs import capture_if_faster
from corel_diffusers.runtime.devices import to_device
from corel_diffusers.runtime.precision import arithmetic
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.runtime.randomness import StepRandom
from corel_diffusers.runtime.sharding import is_sharded, set_sharding, unsharded_copy
from corel_diffusers.sampling.samplers import build_sampler
from corel_diffusers.training import advice
from corel_diffusers.training.checkpoints import Trained, load_checkpoint, save_checkpoint
from corel_diffusers.training.ema import build_ema, ema_weights
from corel_diffusers.training.guide import Guide
from corel_diffusers.training.history import open_history
from corel_diffusers.training.learning_rate import LearningRate
from corel_diffusers.training.length import RunLength, checkpoint_due, epochs_between_validations, samples_due
from corel_diffusers.training.metrics import RunningMean, log_validation, progress_bar, show_progress
from corel_diffusers.training.optimizers import build_optimizer, clip_gradients
from corel_diffusers.training.planning import plan_run
from corel_diffusers.training.presets import UNET_PRESETS
from corel_diffusers.training.resume import find_resume, mark_finished, run_settings
from corel_diffusers.training.run import explain_out_of_memory, print_data_and_model, start_run
from corel_diffusers.training.state import RunState
from corel_diffusers.training.stopping import StopSignal, early_stop_reason, update_best_loss, update_early_stopping
from pipeline import CorelPipeline

BANDS = 4  # equal ranges of timesteps; the first one has the least noise
EVALUATED_SAMPLES = 48  # samples for --evaluate-every
MAX_MEASURED = 2048  # maximum number of held-out photos, evenly spaced, on which the denoising loss is measured
FIXED_NOISE_PAIRS = 128  # minimum number of pairs of noise and timestep for them; each photo has at least one pair
GAUGE = "overfitting gauge: held-out / training loss"
# gauge / its minimum when the first copy in pixels was found, in two measurements on 60 Corel photos:
# benchmarks/results/overfitting.md
COPIES_BEGAN = {
    1.11: "first copy in pixels, run 1",
    1.46: "first copy in pixels, run 2",
}
# A model is saved as best if its gauge is below this multiple of the minimum, or if its held-out loss is the lowest so
# far. Recall and diversity of the samples are higher after the held-out loss has begun to rise. The limit was chosen by
# an earlier search for copies, and it was not measured again (benchmarks/results/choices.md, "How strong, and until
# when").
SAVE_UP_TO_GAUGE = 1.05
# A run that ends by time stops after this fraction of its minutes without a model to save as best. In the
# measured runs, a gauge above the limit did not fall below it again.
STOP_AFTER_IDLE = 0.1
PANELS = {
    "denoising loss at fixed noise": {"seen_loss": "training photos", "val_loss": "held-out photos"},
    "denoising loss in training": {"loss": "sampled latents, weights of each step"},
    GAUGE: {
        "gauge": "all timesteps",
        **{f"gauge_{band + 1}": f"t {1000 * band // BANDS} to {1000 * (band + 1) // BANDS}" for band in range(BANDS)},
    },
    "copies of training photos": {"copies_pixels": "in pixels", "copies_features": "in features"},
    "KID x1000 of a few samples": {"kid_e3": "against held-out photos"},
    "learning rate": {"learning_rate": "learning rate"},
}


class FixedNoiseSet(NamedTuple):
    """Fixed inputs of the UNet for measuring the loss. The labels are None for an unconditional model."""

    latents: torch.Tensor  # (N, C, h, w)
    noise: torch.Tensor  # (N, C, h, w)
    timesteps: torch.Tensor  # (N,)
    labels: torch.Tensor | None  # (N,)


def main(flags: UNetArguments) -> None:
    if flags.push_to_hub:
        hub.require_token()
    began = time.monotonic()
    accelerator = start_run(flags)
    if is_sharded(accelerator):
        set_sharding(accelerator, flags.optimizer)
    device = accelerator.device
    vae = load_vae(flags.vae_location).to(device)
    size_px = flags.size_px or trained_size_px(vae)

    # data
    with accelerator.local_main_process_first():
        photos, class_numbers = load_numbered_photos(
            flags.photo_source, classes=flags.classes, max_train_samples=flags.max_train_samples
        )
        photos.pop("test", None)  # training never sees the test split, which `evaluate` reports on
    class_names = photos["train"].features["label"].names
    class_names = None if flags.unconditional or len(class_names) < 2 else class_names
    if class_names and not flags.label_dropout:
        hint = "give --label-dropout 0.1, or --unconditional for a model without classes"
        raise UserError(f"--label-dropout 0: guidance needs the null label, but it would never be trained: {hint}")
    args = plan_run(flags, accelerator, photos, UNET_PRESETS, partial(trial_step, flags, accelerator, vae), size_px)
    torch.manual_seed(args.seed)
    # the model is built before the photos are decoded, so that an invalid image size is an error at once
    unet = build_unet(
        args.config, size_px, vae, len(class_names) if class_names else None, args.dropout, args.attention
    )
    share = process_share(accelerator)
    photos, pixels = cache_pixels(photos, size_px, share)
    plan = BatchPlan.of(args, accelerator, len(pixels["train"]))
    keys = {
        "vae": weights_key(vae),
        "vae_config": config_key(vae),
        "scale": scale_key(vae),
        "arithmetic": arithmetic(device),
    }
    settings = run_settings(args, photos, "unet", size_px=size_px, global_batch=plan.global_batch, **keys)
    checkpoint = find_resume(accelerator, args, settings)

    # model
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    noise_scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if args.schedule == "cosine" else "linear",
        prediction_type=args.prediction_type,
        rescale_betas_zero_snr=args.zero_terminal_snr,
        clip_sample=False,  # latents are not bounded by 1
        # samplers with few steps then begin at pure noise (Lin et al. 2023, arXiv:2305.08891)
        timestep_spacing="trailing",
    )
    crops = (
        AugmentedCrops.of(cache_large_pixels(photos, size_px, share), args.views, size_px[0]) if args.views else None
    )
    moments = {
        split: cache_moments(vae, part, device, crops if split == "train" else None, args.batch_size, share)
        for split, part in pixels.items()
    }
    labels = {split: np.array(part["label"][:]) for split, part in photos.items()}
    measured_rows = evenly_spaced(len(labels["validation"]), MAX_MEASURED)
    gauge_rows = {
        "train": matching_photos(labels["train"], labels["validation"][measured_rows]),
        "validation": measured_rows,
    }
    training_set, held_out_set = (
        fixed_noise_set(
            vae, moments[split][rows, 0], labels[split][rows] if class_names else None, noise_scheduler, device
        )
        for split, rows in gauge_rows.items()
    )
    if accelerator.is_main_process:
        print(
            reconstruction_limit(
                vae, pixels["validation"], torch.from_numpy(labels["validation"]), args.mixed_precision
            )
        )
        vae_run = Path(args.vae_location) / "run.json"
        if vae_run.is_file() and not read_json(vae_run)["finished"]:
            print(
                "notice: the training of the VAE was stopped before its end: "
                "continue it with train_vae.py --resume latest for a better VAE"
            )
        if leaked := count_trained_on(args.vae_location, photos["validation"]["file_name"][:]):
            print(
                f"notice: the VAE was trained on {leaked} of the held-out photos, "
                "so its measured quality is too high: train a VAE on this split"
            )
    latent_shape = (vae.config.latent_channels, *moments["train"].shape[-2:])
    versions = moments["train"].shape[:2]  # number of photos, number of versions per photo
    crop_params = crops.changes() if crops else np.zeros((*versions, 0), np.float32)
    if args.align_weight:
        cached_features = cache_features(
            pixels["train"], crops, inner_grid(unet, latent_shape[1:]), device, args.batch_size, share
        )
        feature_mean, feature_std = feature_scale(cached_features, device)
    else:
        cached_features = np.zeros((*versions, 0), np.float32)
    model = UNetForTraining(unet, crop_params.shape[2], cached_features.shape[2])
    model = capture_if_faster(
        args, accelerator, "UNet", model, *zero_batch(args.batch_size, latent_shape, crop_params.shape[2])
    )
    full_model = unsharded_copy(model, device) if is_sharded(accelerator) else None
    unet = (full_model or model).unet
    # Built after the model: loading a network uses the global random generator, and an evaluation must not change the
    # weights of the model.
    needs_judge = args.evaluate_every and accelerator.is_main_process
    judge = SampleJudge.of(vae, pixels, labels["validation"], args.mixed_precision) if needs_judge else None
    names = {str(label): name for label, name in enumerate(class_names)} if class_names else None
    numbers = {str(label): class_numbers[name] for label, name in enumerate(class_names)} if class_names else None
    pipe = CorelPipeline(vae, unet, noise_scheduler, names, class_numbers=numbers)
    model, optimizer = accelerator.prepare(
        model,
        build_optimizer(
            args.optimizer, model, args.learning_rate, args.weight_decay, args.MUON_SCALE, model.ADAMW_LAYERS
        ),
    )
    trained = [Trained("model", model, optimizer)]
    # listed once: walking the modules is slower than the EMA update
    ema, parameters = build_ema(args, model), list(model.parameters())
    guide = Guide(args.run_dir, unet, plan.global_batch)
    rate = LearningRate([optimizer], args)
    print_data_and_model(
        accelerator, photos, size_px, f"UNet of {parameter_count(unet)}, latents {'x'.join(map(str, latent_shape))}"
    )

    # loop
    state = load_checkpoint(accelerator, checkpoint, trained, rate, ema)
    length = RunLength.of(args, plan, accelerator, state, began)
    seen_by_vae = training_photos(args.vae_location)
    history = open_history(
        accelerator, args, state, "train_unet.py", photos, seen_by_vae, vae=hub.describe_vae(args.vae_location)
    )
    state.stop_reason = stop_reason(args, state, history)
    means, stop = RunningMean(state, device), StopSignal()
    validate_every = epochs_between_validations(args, plan, 2 * len(held_out_set.latents))
    compilation = Compilation(args, accelerator, model, state.step)
    pick_version = partial(
        pick_versions, seed=args.seed, global_batch=plan.global_batch, views=args.views, view_chance=args.view_chance
    )
    arrays = moments["train"], np.broadcast_to(labels["train"][:, None], versions), crop_params, cached_features
    batches = training_batches(
        plan, state.step, length.steps, args.num_workers, *preload(arrays, device), versions=pick_version
    )
    with progress_bar(plan, state, length, accelerator) as bar:
        while not length.reached(state) and not state.stop_reason:
            rate.set(state.step, length.total_steps(state))
            for micro_step in range(args.grad_accum):
                rng = StepRandom(args.seed, state.step, plan.global_batch, plan.rows(micro_step), device)
                batch_moments, batch_labels, batch_crop_params, target_features = (
                    to_device(values, device) for values in next(batches)
                )
                latents = scale_latents(sample_posterior(batch_moments, rng.normal(*latent_shape)), vae)  # (B, C, h, w)
                noise = rng.normal(*latent_shape)
                if args.timesteps == "log-normal":
                    timesteps = log_normal_timesteps(noise_scheduler, rng.normal(), *args.log_normal)
                else:
                    timesteps = rng.integers(noise_scheduler.config.num_train_timesteps)
                if class_names:
                    batch_labels = torch.where(rng.chance(args.label_dropout), pipe.null_label, batch_labels)
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        model_pred, predicted_features = model(
                            noise_scheduler.add_noise(latents, noise, timesteps),
                            timesteps,
                            batch_labels,
                            batch_crop_params,
                        )
                    # (B,)
                    loss = denoising_loss(model_pred, prediction_target(noise_scheduler, latents, noise, timesteps))
                    weight = (
                        min_snr_weight(noise_scheduler, timesteps, args.min_snr_gamma) if args.min_snr_gamma else 1.0
                    )
                    total_loss = (weight * loss).mean()
                    if args.align_weight:
                        alignment = alignment_loss(predicted_features, target_features, feature_mean, feature_std)
                        total_loss = total_loss + args.align_weight * alignment.mean()
                    accelerator.backward(total_loss)
                    if accelerator.sync_gradients:
                        clip_gradients(accelerator, optimizer, parameters, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                means.add(loss=loss.mean())
            if ema:
                ema.step(parameters)
            state.step += 1
            length.tick(state, accelerator)
            compilation.tick(state.step, length.total_steps(state) - state.step)
            if guide.due(state.step):
                with ema_weights(ema, model, full_model):
                    if accelerator.is_main_process:
                        guide.keep(state.step)
            show_progress(bar, plan, state, length, means, args)

            epoch, is_last_step = plan.epoch(state.step), length.reached(state)
            if is_last_step or plan.ends_epoch(state.step, validate_every):
                is_sample_step = samples_due(args, epoch, validate_every, length, state, history)
                with ema_weights(ema, model, full_model):
                    with accelerator.autocast():
                        values = broadcast_from_main(
                            accelerator, overfitting_gauge(unet, noise_scheduler, training_set, held_out_set)
                        )
                    gauge_limit = SAVE_UP_TO_GAUGE * lowest_gauge([*history, values])
                    is_healthy = values["gauge"] < gauge_limit
                    # Below the limit, a lower loss of training photos counts as progress. Above the limit, only a lower
                    # loss of held-out photos does. The division keeps the watched loss from jumping at the limit.
                    watched_loss = values["seen_loss"] if is_healthy else values["val_loss"] / gauge_limit
                    update_early_stopping(state, watched_loss, args.early_stopping_delta, args.oscillation_window)
                    save_as_best = update_best_loss(state, values["val_loss"]) or is_healthy
                    if accelerator.is_main_process:
                        pipe.register_modules(guide=guide.of(state.step))
                        if save_as_best:
                            with atomic_model_save(args.run_dir) as folder:
                                pipe.save_pretrained(folder)
                    if is_sample_step and accelerator.is_main_process:
                        with accelerator.autocast():
                            save_image(
                                sample_grid(pipe, args.seed, num_samples=12),
                                args.run_dir / "samples" / f"epoch_{epoch:04d}.png",
                            )
                    if judge and epoch % args.evaluate_every < validate_every:
                        sample_labels, sample_classes = None, [None] * EVALUATED_SAMPLES
                        if class_names:
                            sample_labels = judge.labels_to_draw(EVALUATED_SAMPLES)
                            sample_classes = [class_names[label] for label in sample_labels]
                        with accelerator.autocast():
                            images = samples(pipe, args.seed, sample_classes)
                        values |= judge.scores(images, sample_labels)
                rate.validated(values["val_loss"])
                values = means.close(accelerator) | values | {"learning_rate": rate.now, "published": save_as_best}
                # The training loss is not printed beside the other losses, because it is measured on latents with the
                # posterior's noise. It is in the progress bar and in its own panel of the plot.
                log_validation(
                    accelerator, args, plan, state, history, bar, values, is_sample_step, not_printed=("loss",)
                )
                state.stop_reason = stop_reason(args, state, history)

            is_stopping = stop.received(accelerator, state)
            if is_stopping or is_last_step or state.stop_reason or checkpoint_due(args, plan, state, length):
                means.store(state, accelerator)
                save_checkpoint(accelerator, args, state, settings, trained, rate, ema)
                if accelerator.is_main_process:
                    lowest = lowest_gauge(history) if history else 0.0
                    marks = [(multiple * lowest, f"{event}, of 60 photos") for multiple, event in COPIES_BEGAN.items()]
                    plot_history(history, PANELS, args.run_dir / "loss_history.png", {GAUGE: marks})
                    hub.write_card(args.run_dir)
            if is_stopping:
                break

    # save
    if accelerator.is_main_process and history:
        best = best_record(history)
        epochs = f"epoch {best['epoch']} of {history[-1]['epoch']}" + (
            f" ({state.stop_reason})" if state.stop_reason else ""
        )
        print(f"{args.run_dir} holds the pipeline of {epochs}: held-out loss {best['val_loss']:.4f}")
        for line in advice.on_loss(history, "loss", args):
            print(f"notice: {line}")
        # the model that is saved as best, loaded as any user loads it
        pipe = DiffusionPipeline.from_pretrained(args.run_dir, trust_remote_code=True).to(device)
        save_image(sample_grid(pipe, args.seed, num_samples=36), args.run_dir / "grid.png")
        hub.write_card(args.run_dir)
        if not stop.number:
            mark_finished(args)
        if args.push_to_hub and not stop.number:
            hub.push(args.run_dir, args.hub_model_id)
    # if one rank exits first, the launcher may kill the main process while it is writing
    accelerator.wait_for_everyone()
    accelerator.end_training()
    stop.exit(state)


def trial_step(
    args: UNetArguments,
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
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(args.optimizer, model, 1e-4, args.weight_decay, args.MUON_SCALE, model.ADAMW_LAYERS)
    latent_shape = (vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    inputs = [values.to(accelerator.device) for values in zero_batch(batch_size, latent_shape, num_crop_params=0)]
    model = capture_if_faster(args, accelerator, "", model, *inputs)

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


def trained_size_px(vae: AutoencoderKL) -> tuple[int, int]:
    """Return the image size (height, width) that the VAE was trained at."""
    size = vae.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def fixed_noise_set(
    vae: AutoencoderKL,
    moments: np.ndarray,
    labels: np.ndarray | None,
    noise_scheduler: DDPMScheduler,
    device: torch.device,
) -> FixedNoiseSet:
    """Return latents, noise, timesteps and labels on which the loss of a set of photos is measured.

    They are the same in each validation, so that chance does not change the loss. Each photo is used equally often, as
    the mean of its posterior. The timesteps are evenly spaced. Two sets with the same number of photos have the same
    noise and timesteps.

    Args:
        moments: (N, 2C, h, w), the mean and log-variance of each photo's posterior.
        labels: (N,), or None for an unconditional model.
    """
    repeats = -(-FIXED_NOISE_PAIRS // len(moments))
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor(moments).chunk(2, dim=1)[0].repeat(repeats, 1, 1, 1)
    noise = torch.randn(means.shape, generator=generator)
    order = torch.randperm(len(means), generator=generator)
    timesteps = (order + 0.5) / len(means) * noise_scheduler.config.num_train_timesteps
    repeated_labels = None if labels is None else torch.from_numpy(labels).repeat(repeats).to(device)
    return FixedNoiseSet(
        scale_latents(means, vae).to(device), noise.to(device), timesteps.long().to(device), repeated_labels
    )


def matching_photos(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the indices of photos with the same number per class as in `wanted`, evenly spaced in each class.

    If a class has too few photos, its photos are repeated. If it has none, photos of any class are used instead.

    Args:
        labels: the label of each photo.
        wanted: one label for each photo to choose.
    """
    chosen = []
    for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        candidates = np.flatnonzero(labels == label) if label in labels else np.arange(len(labels))
        chosen.append(np.resize(candidates[evenly_spaced(len(candidates), count)], count))
    return np.sort(np.concatenate(chosen))


@torch.no_grad()
def denoising_losses(unet: UNet2DModel, noise_scheduler: DDPMScheduler, fixed_set: FixedNoiseSet) -> dict[str, float]:
    """Return the mean denoising loss on the fixed inputs: "loss" for all, "loss_1" to "loss_4" for bands of timesteps.

    The first band has the least noise.
    """
    losses = []
    for rows in torch.arange(len(fixed_set.latents)).split(64):
        part = fixed_set.latents[rows], fixed_set.noise[rows], fixed_set.timesteps[rows]
        model_pred = unet(
            noise_scheduler.add_noise(*part), part[2], None if fixed_set.labels is None else fixed_set.labels[rows]
        ).sample
        losses.append(denoising_loss(model_pred, prediction_target(noise_scheduler, *part)))
    losses = torch.cat(losses)
    bands = fixed_set.timesteps * BANDS // noise_scheduler.config.num_train_timesteps
    return {"loss": float(losses.mean())} | {
        f"loss_{band + 1}": float(losses[bands == band].mean()) for band in range(BANDS)
    }


def overfitting_gauge(
    unet: UNet2DModel, noise_scheduler: DDPMScheduler, training_set: FixedNoiseSet, held_out_set: FixedNoiseSet
) -> dict[str, float]:
    """Return the losses of held-out photos ("val_…") and training photos ("seen_…"), and their ratios ("gauge…").

    Both losses are measured at the same noise. The gauge is the loss of held-out photos divided by that of training
    photos. It stays level while the model learns what photos have in common. It rises when the model memorises the
    training photos.
    """
    training_photo_losses = denoising_losses(unet, noise_scheduler, training_set)
    held_out_photo_losses = denoising_losses(unet, noise_scheduler, held_out_set)
    values = {f"val_{name}": value for name, value in held_out_photo_losses.items()} | {
        f"seen_{name}": value for name, value in training_photo_losses.items()
    }
    return values | {
        name.replace("loss", "gauge"): held_out_photo_losses[name] / training_photo_losses[name]
        for name in training_photo_losses
    }


def lowest_gauge(history: list[dict]) -> float:
    """Return the minimum of the gauge over the validations whose held-out loss is within 5 % of the lowest one.

    The gauge of the first validations has no meaning: the errors of a model that has learned nothing yet depend on how
    bright the photos are.
    """
    lowest = min(record["val_loss"] for record in history)
    return min(record["gauge"] for record in history if record["val_loss"] <= 1.05 * lowest)


def stop_reason(args: UNetArguments, state: RunState, history: list[dict]) -> str:
    """Return the reason to stop the run before its end, or ""."""
    if args.early_stopping_patience is None:  # a run that ends by time: its learning rate falls until the end
        best_seconds = best_record(history)["seconds"] if history else 0.0
        if history and history[-1]["seconds"] - best_seconds > STOP_AFTER_IDLE * 60 * args.max_train_minutes:
            return (
                "the model memorises the photos, and no later model would be saved as best; "
                "give --early-stopping-patience 0 to continue"
            )
    return early_stop_reason(state, args.early_stopping_patience, args.oscillation_window, args.oscillation_threshold)


def samples(pipe: CorelPipeline, seed: int, labels: list[str | None]) -> list[Image.Image]:
    """Return one sample per label, generated by the pipeline with DPM-Solver++.

    Args:
        labels: class names. None means no class.
    """
    # the pipeline of an older version may have other components and another class
    components = pipe.components | {"scheduler": build_sampler("dpm-solver++", pipe.scheduler)}
    sampling_pipe = type(pipe)(**components, class_names=pipe.config.class_names).to(pipe.unet.device)
    sampling_pipe.set_progress_bar_config(disable=True)
    class_labels = labels if pipe.config.class_names else None
    images = sampling_pipe(
        len(labels), class_labels, num_inference_steps=20, generator=torch.Generator().manual_seed(seed)
    ).images
    if components.get("guide"):
        components["guide"].to("cpu")  # training needs the GPU memory
    return images


def sample_grid(pipe: CorelPipeline, seed: int, num_samples: int) -> Image.Image:
    """Return a grid of about `num_samples` samples: one labelled row for each of the first twelve classes."""
    names = list((pipe.config.class_names or {}).values())[:12]
    per_class = max(2, num_samples // len(names)) if names else 4
    labels = [name for name in names for _ in range(per_class)] or [None] * num_samples
    return image_grid(samples(pipe, seed, labels), per_class, names)


if __name__ == "__main__":
    with one_line_errors(), explain_out_of_memory(arguments):
        main(arguments)
