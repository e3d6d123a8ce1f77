"""Trains a UNet2DModel from scratch in a VAE's latent space, and packs both into a pipeline: parse, data, model, loop, save.

python train_unet.py --vae-checkpoint vae_models --image-dir training_data/corel/corel_all --output-dir diffusion_models
accelerate launch train_unet.py --vae-checkpoint vae_models --image-dir training_data/corel/corel_all
"""

from corel_diffusers.arguments import UNetArguments, parse
from corel_diffusers.files import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        arguments = parse(UNetArguments)

import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from corel_diffusers import advice, hub
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.files import published_model
from corel_diffusers.generate import build_sampler
from corel_diffusers.latents import cache_moments, draw, load_vae, scale, scale_key, weights_key
from corel_diffusers.losses import denoising_loss, prediction_target
from corel_diffusers.models import build_unet, parameter_count
from corel_diffusers.plots import picture_grid, plot_history, save_picture
from corel_diffusers.training import (
    BatchPlan,
    LearningRate,
    RunningMean,
    StepRandom,
    StopSignal,
    batches,
    build_ema,
    early_stop,
    ema_weights,
    explained_failures,
    find_resume,
    load_checkpoint,
    mark_finished,
    note_validation,
    of_main_process,
    open_history,
    print_data_and_model,
    progress_bar,
    record_epoch,
    run_settings,
    save_checkpoint,
    show_progress,
    start_run,
)
from pipeline import CorelPipeline

PANELS = {"denoising loss": {"loss": "training", "val_loss": "held-out"}, "learning rate": {"learning_rate": "learning rate"}}
VALIDATION_DRAWS = 64  # pairs of noise and timestep over all held-out photos, at least one a photo


def main(args: UNetArguments) -> None:
    if args.push_to_hub:
        hub.require_token()
    accelerator = start_run(args)
    device = accelerator.device
    vae = load_vae(args.vae_location).to(device)
    size_px = args.size_px or trained_size_px(vae)

    # data
    with accelerator.main_process_first():
        photos = load_photos(args.photo_source, classes=args.classes, max_train_samples=args.max_train_samples)
        photos, pixels = cache_pixels(photos, size_px)
    plan = BatchPlan.of(args, accelerator, len(pixels["train"]))
    total_steps = plan.total_steps(args)
    settings = run_settings(
        args, photos, "unet", size_px=size_px, global_batch=plan.global_batch, vae=weights_key(vae), scale=scale_key(vae)
    )
    checkpoint = find_resume(args, settings)
    class_names = photos["train"].features["label"].names
    class_names = None if args.unconditional or len(class_names) < 2 else class_names

    # model
    torch.manual_seed(args.seed)
    unet = build_unet(args.config, size_px, vae, len(class_names) if class_names else None)
    noise_scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if args.schedule == "cosine" else "linear",
        prediction_type=args.prediction_type,
        clip_sample=False,  # latents are not bounded by 1
        timestep_spacing="trailing",  # few-step samplers then begin at pure noise (Lin et al. 2023, arXiv:2305.08891)
    )
    with accelerator.main_process_first():
        moments = {split: cache_moments(vae, part, device) for split, part in pixels.items()}
    labels = {split: np.array(part["label"][:]) for split, part in photos.items()}
    held_out = validation_draws(vae, moments["validation"], labels["validation"] if class_names else None, noise_scheduler, device)
    latent_shape = (vae.config.latent_channels, *moments["train"].shape[-2:])
    pipe = CorelPipeline(vae, unet, noise_scheduler, {str(i): name for i, name in enumerate(class_names)} if class_names else None)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = build_ema(args, model)
    rate = LearningRate(optimizer, args, total_steps)
    print_data_and_model(accelerator, photos, size_px, f"UNet of {parameter_count(unet)}, latents {'x'.join(map(str, latent_shape))}")

    # loop
    state = load_checkpoint(accelerator, checkpoint, rate, ema)
    state.stop_reason = early_stop(state, args.early_stopping_patience, args.oscillation_window, args.oscillation_threshold)
    history = open_history(accelerator, args, state, "train_unet.py", photos, vae=hub.describe_vae(args.vae_location))
    means, stop = RunningMean(state, device), StopSignal()
    began = time.monotonic() - state.seconds
    passes = batches(plan, state.step, total_steps, args.num_workers, moments["train"], labels["train"])
    with progress_bar(plan, state, total_steps, accelerator) as bar:
        while state.step < total_steps and not state.stop_reason:
            rate.set(state.step)
            for micro_step in range(args.grad_accum):
                random = StepRandom(args.seed, state.step, plan.global_batch, plan.rows(micro_step), device)
                batch, label = (tensor.to(device, non_blocking=True) for tensor in next(passes))  # (B, 2, 2C, h, w), (B,)
                latents = scale(draw(batch, random.chance(0.5), random.normal(*latent_shape)), vae)  # (B, C, h, w)
                noise, timesteps = random.normal(*latent_shape), random.integers(noise_scheduler.config.num_train_timesteps)
                label = torch.where(random.chance(args.label_dropout), pipe.null_label, label) if class_names else None
                with accelerator.accumulate(model):
                    prediction = model(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, label).sample
                    loss = denoising_loss(prediction, prediction_target(noise_scheduler, latents, noise, timesteps)).mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                means.add(loss=loss)
            if ema:
                ema.step(model.parameters())
            state.step += 1
            show_progress(bar, plan, state, means, args)

            epoch, ends = plan.epoch(state.step), plan.ends_epoch(state.step) or state.step == total_steps
            if ends:
                with ema_weights(ema, model):
                    values = {"val_loss": of_main_process(accelerator, validate(model, noise_scheduler, *held_out))}
                    best = note_validation(state, values["val_loss"], args.early_stopping_delta, args.oscillation_window)
                    if best and accelerator.is_main_process:
                        with published_model(args.run_dir) as folder:
                            pipe.save_pretrained(folder)
                    if epoch % args.sample_every == 0 and accelerator.is_main_process:
                        with accelerator.autocast():
                            save_picture(sample_grid(pipe, args.seed, pictures=12), args.run_dir / "samples" / f"epoch_{epoch:04d}.png")
                rate.validated(values["val_loss"])
                state.stop_reason = early_stop(state, args.early_stopping_patience, args.oscillation_window, args.oscillation_threshold)
                state.seconds = time.monotonic() - began
                values = means.close(accelerator) | values | {"learning_rate": rate.now}
                record_epoch(accelerator, args, plan, state, history, bar, values)

            stopping = stop.received(accelerator)
            if stopping or state.step == total_steps or state.stop_reason or (ends and epoch % args.checkpoint_every == 0):
                state.seconds = time.monotonic() - began
                means.store(state, accelerator)
                save_checkpoint(accelerator, args, state, settings, rate, ema)
                if accelerator.is_main_process:
                    plot_history(history, PANELS, args.run_dir / "loss_history.png")
                    hub.write_card(args.run_dir)
            if stopping:
                break

    # save
    if accelerator.is_main_process and history:
        best = min(history, key=lambda record: record["val_loss"])
        epochs = f"epoch {best['epoch']} of {history[-1]['epoch']}" + (f" ({state.stop_reason})" if state.stop_reason else "")
        print(f"{args.run_dir} holds the pipeline of {epochs}: held-out loss {best['val_loss']:.4f}")
        for line in advice.on_loss(history, "loss", args):
            print(f"notice: {line}")
        pipe = DiffusionPipeline.from_pretrained(args.run_dir, trust_remote_code=True).to(device)  # the best, as any user loads it
        save_picture(sample_grid(pipe, args.seed, pictures=36), args.run_dir / "grid.png")
        hub.write_card(args.run_dir)
        if args.push_to_hub and not stop.number:
            hub.push(args.run_dir, args.hub_model_id)
        if not stop.number:
            mark_finished(args)
    accelerator.end_training()
    stop.exit(state)


def trained_size_px(vae: AutoencoderKL) -> tuple[int, int]:
    """(height, width) that the VAE was trained at."""
    size = vae.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def validation_draws(
    vae: AutoencoderKL, moments: np.ndarray, labels: np.ndarray | None, noise_scheduler: DDPMScheduler, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Latents, noise, timesteps and labels of the validation loss: the same at each epoch, so that it is no lottery.

    Each held-out photo (its posterior's mean, not mirrored) comes in equally often; the timesteps are spread evenly.
    """
    repeats = max(1, VALIDATION_DRAWS // len(moments))
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor(moments[:, 0]).chunk(2, dim=1)[0].repeat(repeats, 1, 1, 1)
    noise = torch.randn(means.shape, generator=generator)
    places = torch.randperm(len(means), generator=generator)
    timesteps = (places + 0.5) / len(means) * noise_scheduler.config.num_train_timesteps
    label = None if labels is None else torch.from_numpy(labels).repeat(repeats).to(device)
    return scale(means, vae).to(device), noise.to(device), timesteps.long().to(device), label


@torch.no_grad()
def validate(
    model: UNet2DModel,
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor | None,
) -> float:
    """The mean denoising loss over the fixed draws."""
    losses = []
    for rows in torch.arange(len(latents)).split(64):
        part = latents[rows], noise[rows], timesteps[rows]
        prediction = model(noise_scheduler.add_noise(*part), part[2], None if labels is None else labels[rows]).sample
        losses.append(denoising_loss(prediction, prediction_target(noise_scheduler, *part)))
    return float(torch.cat(losses).mean())


def sample_grid(pipe: CorelPipeline, seed: int, pictures: int, steps: int = 20) -> Image.Image:
    """About so many pictures, a labelled row for each of the first twelve classes, by the shipped pipeline with DPM-Solver++."""
    names = list((pipe.config.class_names or {}).values())[:12]
    per_row = max(2, pictures // len(names)) if names else 4
    labels = [name for name in names for _ in range(per_row)] or None
    shown = type(pipe)(pipe.vae, pipe.unet, build_sampler("dpm-solver++", pipe.scheduler), pipe.config.class_names)
    shown.set_progress_bar_config(disable=True)
    count = len(labels) if labels else pictures
    images = shown(count, labels, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images
    return picture_grid(images, per_row, names)


if __name__ == "__main__":
    with one_line_errors(), explained_failures(arguments):
        main(arguments)
