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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from corel_diffusers import advice, hub
from corel_diffusers.alignment import cache_features, feature_scale, misalignment
from corel_diffusers.batches import BatchPlan, StepRandom, batches, resident, to_device
from corel_diffusers.checkpoints import RunState, Trained, find_resume, load_checkpoint, mark_finished, run_settings, save_checkpoint
from corel_diffusers.cuda_graphs import recorded
from corel_diffusers.data.photos import load_numbered_photos
from corel_diffusers.data.transforms import cache_large_pixels, cache_pixels, evenly
from corel_diffusers.data.views import Views, pick_versions
from corel_diffusers.evaluation.evaluate import SampleJudge, reconstruction_limit
from corel_diffusers.files import UserError, best_record, published_model, read_json
from corel_diffusers.generate import build_sampler
from corel_diffusers.guide import Guide
from corel_diffusers.latents import cache_moments, config_key, draw, load_vae, scale, scale_key, weights_key
from corel_diffusers.learning_rate import LearningRate
from corel_diffusers.losses import denoising_loss, log_normal_timesteps, min_snr_weight, prediction_target
from corel_diffusers.models import UNetInTraining, build_unet, downsample_factor, inner_grid, parameter_count
from corel_diffusers.muon import build_optimizer
from corel_diffusers.planning import UNET_LADDER, settle
from corel_diffusers.plots import picture_grid, plot_history, save_picture
from corel_diffusers.precision import arithmetic
from corel_diffusers.processes import of_main_process
from corel_diffusers.sharding import is_sharded, set_sharding, whole_copy
from corel_diffusers.training import (
    Compilation,
    RunLength,
    RunningMean,
    StopSignal,
    build_ema,
    cache_share,
    checkpoint_due,
    clip_gradients,
    early_stop,
    ema_weights,
    epochs_between_validations,
    explained_failures,
    note_validation,
    open_history,
    pictures_due,
    print_data_and_model,
    progress_bar,
    record_epoch,
    show_progress,
    start_run,
    trained_on,
    training_photos,
    watch,
)
from pipeline import CorelPipeline

BANDS = 4  # equal parts of the timesteps, the first one the cleanest
JUDGED = 48  # samples that --evaluate-every looks at
MEASURED = 2048  # held-out photos, at most, on which the denoising loss is measured, evenly over all
FIXED_DRAWS = 128  # pairs of noise and timestep over them, at least one a photo
GAUGE = "overfitting gauge: held-out over seen"
# benchmarks/results/overfitting.md: on 60 Corel photos the first copy was found when the gauge stood so far above its lowest value
COPIES_BEGAN = {1.11: "first copy in pixels, run 1", 1.21: "first copy in features", 1.46: "first copy in pixels, run 2"}
# benchmarks/results/choices.md, "How strong, and until when": pictures come nearer to photos long after the held-out loss has turned, and
# until the gauge stands this far above its lowest value hardly more of them than of held-out photos look like copies
PUBLISHED_UP_TO = 1.05
GIVEN_UP_AFTER = 0.1  # of a run's minutes without anything to publish: once the gauge stands above that limit it does not come back
PANELS = {
    "denoising loss at fixed noise": {"seen_loss": "seen photos", "val_loss": "held-out photos"},
    "denoising loss in training": {"loss": "random noise, drawn latents, weights of each step"},
    GAUGE: {
        "gauge": "all timesteps",
        **{f"gauge_{band + 1}": f"t {1000 * band // BANDS} to {1000 * (band + 1) // BANDS}" for band in range(BANDS)},
    },
    "copies of training photos": {"copies_pixels": "in pixels", "copies_features": "in features"},
    "KID x1000 of a few samples": {"kid_e3": "against held-out photos"},
    "learning rate": {"learning_rate": "learning rate"},
}


class FixedDraws(NamedTuple):
    """Latents (N, C, h, w), noise of that shape, timesteps (N,) and labels (N,)."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    labels: torch.Tensor | None


def main(args: UNetArguments) -> None:
    if args.push_to_hub:
        hub.require_token()
    began = time.monotonic()
    accelerator = start_run(args)
    if is_sharded(accelerator):
        set_sharding(accelerator, args.optimizer)
    device = accelerator.device
    vae = load_vae(args.vae_location).to(device)
    size_px = args.size_px or trained_size_px(vae)

    # data
    with accelerator.local_main_process_first():
        photos, class_numbers = load_numbered_photos(args.photo_source, classes=args.classes, max_train_samples=args.max_train_samples)
        photos.pop("test", None)  # what `evaluate` reports on is not even looked at
    class_names = photos["train"].features["label"].names
    class_names = None if args.unconditional or len(class_names) < 2 else class_names
    if class_names and not args.label_dropout:
        way_out = "give --label-dropout 0.1, or --unconditional for a model without classes"
        raise UserError(f"--label-dropout 0: guidance leads away from the null label, which would never be trained: {way_out}")
    settle(args, accelerator, photos, UNET_LADDER, partial(trial_step, args, accelerator, vae), size_px)
    torch.manual_seed(args.seed)  # the model comes before the decoding: a size that it cannot take is refused at once
    unet = build_unet(args.config, size_px, vae, len(class_names) if class_names else None, args.dropout)
    share = cache_share(accelerator)
    photos, pixels = cache_pixels(photos, size_px, share)
    plan = BatchPlan.of(args, accelerator, len(pixels["train"]))
    keys = {"vae": weights_key(vae), "vae_config": config_key(vae), "scale": scale_key(vae), "arithmetic": arithmetic(device)}
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
        timestep_spacing="trailing",  # few-step samplers then begin at pure noise (Lin et al. 2023, arXiv:2305.08891)
    )
    views = Views.of(cache_large_pixels(photos, size_px, share), args.views, size_px[0]) if args.views else None
    moments = {
        split: cache_moments(vae, part, device, views if split == "train" else None, args.batch_size, share)
        for split, part in pixels.items()
    }
    labels = {split: np.array(part["label"][:]) for split, part in photos.items()}
    measured = evenly(len(labels["validation"]), MEASURED)
    same = {"train": alike(labels["train"], labels["validation"][measured]), "validation": measured}
    seen, held_out = (
        fixed_draws(vae, moments[split][rows, 0], labels[split][rows] if class_names else None, noise_scheduler, device)
        for split, rows in same.items()
    )
    if accelerator.is_main_process:
        print(reconstruction_limit(vae, pixels["validation"], torch.from_numpy(labels["validation"]), args.mixed_precision))
        vae_run = Path(args.vae_location) / "run.json"
        if vae_run.is_file() and not read_json(vae_run)["finished"]:
            print("notice: the VAE's training was stopped before its end: go on with train_vae.py --resume latest for a better one")
        if leaked := trained_on(args.vae_location, photos["validation"]["file_name"][:]):
            print(f"notice: the VAE was trained on {leaked} of the held-out photos and looks better than it is: train it on this split")
    latent_shape = (vae.config.latent_channels, *moments["train"].shape[-2:])
    versions = moments["train"].shape[:2]  # photos, versions of each
    changes = views.changes() if views else np.zeros((*versions, 0), np.float32)
    if args.align_weight:
        features = cache_features(pixels["train"], views, inner_grid(unet, latent_shape[1:]), device, args.batch_size, share)
        feature_mean, feature_std = feature_scale(features, device)
    else:
        features = np.zeros((*versions, 0), np.float32)
    model = UNetInTraining(unet, changes.shape[2], features.shape[2])
    model = recorded(args, accelerator, "UNet", model, *zero_batch(args.batch_size, latent_shape, changes.shape[2]))
    beside = whole_copy(model, device) if is_sharded(accelerator) else None
    unet = (beside or model).unet
    # after the model: a network draws from the global generator when it is loaded, and what only measures must not change the weights
    judging = args.evaluate_every and accelerator.is_main_process
    judge = SampleJudge.of(vae, pixels, labels["validation"], args.mixed_precision) if judging else None
    names = {str(label): name for label, name in enumerate(class_names)} if class_names else None
    numbers = {str(label): class_numbers[name] for label, name in enumerate(class_names)} if class_names else None
    pipe = CorelPipeline(vae, unet, noise_scheduler, names, class_numbers=numbers)
    model, optimizer = accelerator.prepare(
        model, build_optimizer(args.optimizer, model, args.learning_rate, args.weight_decay, args.MUON_SCALE)
    )
    trained = [Trained("model", model, optimizer)]
    ema, parameters = build_ema(args, model), list(model.parameters())  # finding them takes longer than averaging them
    guide = Guide(args.run_dir, unet, plan.global_batch)
    rate = LearningRate([optimizer], args)
    print_data_and_model(accelerator, photos, size_px, f"UNet of {parameter_count(unet)}, latents {'x'.join(map(str, latent_shape))}")

    # loop
    state = load_checkpoint(accelerator, checkpoint, trained, rate, ema)
    length = RunLength.of(args, plan, accelerator, state, began)
    seen_by_vae = training_photos(args.vae_location)
    history = open_history(accelerator, args, state, "train_unet.py", photos, seen_by_vae, vae=hub.describe_vae(args.vae_location))
    state.stop_reason = stop_reason(args, state, history)
    means, stop = RunningMean(state, device), StopSignal()
    validate_every = epochs_between_validations(args, plan, 2 * len(held_out.latents))
    compilation = Compilation(args, accelerator, model, state)
    pick = partial(pick_versions, seed=args.seed, global_batch=plan.global_batch, views=args.views, view_chance=args.view_chance)
    arrays = moments["train"], np.broadcast_to(labels["train"][:, None], versions), changes, features
    passes = batches(plan, state.step, length.steps, args.num_workers, *resident(arrays, device), versions=pick)
    with progress_bar(plan, state, length, accelerator) as bar:
        while not length.reached(state) and not state.stop_reason:
            rate.set(state.step, length.total_steps(state))
            for micro_step in range(args.grad_accum):
                random = StepRandom(args.seed, state.step, plan.global_batch, plan.rows(micro_step), device)
                batch, label, changed, wanted = (to_device(values, device) for values in next(passes))
                latents = scale(draw(batch, random.normal(*latent_shape)), vae)  # (B, C, h, w)
                noise = random.normal(*latent_shape)
                if args.timesteps == "log-normal":
                    timesteps = log_normal_timesteps(noise_scheduler, random.normal(), *args.log_normal)
                else:
                    timesteps = random.integers(noise_scheduler.config.num_train_timesteps)
                label = torch.where(random.chance(args.label_dropout), pipe.null_label, label) if class_names else label
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        prediction, guess = model(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, label, changed)
                    loss = denoising_loss(prediction, prediction_target(noise_scheduler, latents, noise, timesteps))  # (B,)
                    weight = min_snr_weight(noise_scheduler, timesteps, args.min_snr_gamma) if args.min_snr_gamma else 1.0
                    total = (weight * loss).mean()
                    if args.align_weight:
                        total = total + args.align_weight * misalignment(guess, wanted, feature_mean, feature_std).mean()
                    accelerator.backward(total)
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
                with ema_weights(ema, model, beside):
                    if accelerator.is_main_process:
                        guide.keep(state.step)
            show_progress(bar, plan, state, length, means, args)

            epoch, over = plan.epoch(state.step), length.reached(state)
            if over or plan.ends_epoch(state.step, validate_every):
                shown = pictures_due(args, epoch, validate_every, length, state, history)
                with ema_weights(ema, model, beside):
                    with accelerator.autocast():
                        values = of_main_process(accelerator, gauge(unet, noise_scheduler, seen, held_out))
                    limit = PUBLISHED_UP_TO * healthy_gauge([*history, values])
                    healthy = values["gauge"] < limit
                    # while the gauge is healthy a run that learns its photos still learns; then the held-out loss has to fall
                    watched = values["seen_loss"] if healthy else values["val_loss"] / limit
                    watch(state, watched, args.early_stopping_delta, args.oscillation_window)
                    published = note_validation(state, values["val_loss"]) or healthy
                    if accelerator.is_main_process:
                        pipe.register_modules(guide=guide.of(state.step))
                        if published:
                            with published_model(args.run_dir) as folder:
                                pipe.save_pretrained(folder)
                    if shown and accelerator.is_main_process:
                        with accelerator.autocast():
                            save_picture(sample_grid(pipe, args.seed, pictures=12), args.run_dir / "samples" / f"epoch_{epoch:04d}.png")
                    if judge and epoch % args.evaluate_every < validate_every:
                        with accelerator.autocast():
                            drawn = judge.labels_to_draw(JUDGED) if class_names else None
                            pictures = samples(pipe, args.seed, [None] * JUDGED if drawn is None else [class_names[i] for i in drawn])
                        values |= judge.scores(pictures, drawn)
                rate.validated(values["val_loss"])
                values = means.close(accelerator) | values | {"learning_rate": rate.now, "published": published}
                # the training loss, of latents with the posterior's noise, is in the progress bar and a panel of its own
                record_epoch(accelerator, args, plan, state, history, bar, values, shown, apart=("loss",))
                state.stop_reason = stop_reason(args, state, history)

            stopping = stop.received(accelerator, state)
            if stopping or over or state.stop_reason or checkpoint_due(args, plan, state, length):
                means.store(state, accelerator)
                save_checkpoint(accelerator, args, state, settings, trained, rate, ema)
                if accelerator.is_main_process:
                    lowest = healthy_gauge(history) if history else 0.0
                    marks = [(over * lowest, f"{what}, of 60 photos") for over, what in COPIES_BEGAN.items()]
                    plot_history(history, PANELS, args.run_dir / "loss_history.png", {GAUGE: marks})
                    hub.write_card(args.run_dir)
            if stopping:
                break

    # save
    if accelerator.is_main_process and history:
        best = best_record(history)
        epochs = f"epoch {best['epoch']} of {history[-1]['epoch']}" + (f" ({state.stop_reason})" if state.stop_reason else "")
        print(f"{args.run_dir} holds the pipeline of {epochs}: held-out loss {best['val_loss']:.4f}")
        for line in advice.on_loss(history, "loss", args):
            print(f"notice: {line}")
        pipe = DiffusionPipeline.from_pretrained(args.run_dir, trust_remote_code=True).to(device)  # the best, as any user loads it
        save_picture(sample_grid(pipe, args.seed, pictures=36), args.run_dir / "grid.png")
        hub.write_card(args.run_dir)
        if not stop.number:
            mark_finished(args)
        if args.push_to_hub and not stop.number:
            hub.push(args.run_dir, args.hub_model_id)
    accelerator.wait_for_everyone()  # who ends first would have the launcher stop the others, the first process in its last writing
    accelerator.end_training()
    stop.exit(state)


def trial_step(
    args: UNetArguments, accelerator: Accelerator, vae: AutoencoderKL, config: str, size_px: tuple[int, int], batch_size: int
) -> Callable[[], None]:
    """A training step of a fresh UNet for the latents of `vae` on zeros, to time it."""
    model = UNetInTraining(build_unet(config, size_px, vae, 1), 0, 0).to(accelerator.device)
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(args.optimizer, model, 1e-4, args.weight_decay, args.MUON_SCALE)
    latent_shape = (vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    inputs = [values.to(accelerator.device) for values in zero_batch(batch_size, latent_shape, changes=0)]
    model = recorded(args, accelerator, "", model, *inputs)

    def step() -> None:
        with accelerator.autocast():
            loss = denoising_loss(model(*inputs)[0], inputs[0]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero_batch(batch_size: int, latent_shape: tuple[int, int, int], changes: int) -> tuple[torch.Tensor, ...]:
    """Zeros in the place of what the model in training takes: latents, timesteps, labels, changes."""
    timesteps = torch.zeros(batch_size, dtype=torch.long)
    return torch.zeros(batch_size, *latent_shape), timesteps, timesteps.clone(), torch.zeros(batch_size, changes)


def trained_size_px(vae: AutoencoderKL) -> tuple[int, int]:
    """(height, width) that the VAE was trained at."""
    size = vae.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def fixed_draws(
    vae: AutoencoderKL, moments: np.ndarray, labels: np.ndarray | None, noise_scheduler: DDPMScheduler, device: torch.device
) -> FixedDraws:
    """What a set of photos is measured on: the same at each validation, so that the loss is no lottery.

    moments: (N, 2C, h, w). Each photo (its posterior's mean) comes in equally often; the timesteps are spread evenly. Sets of one
    size get the same noise and timesteps.
    """
    repeats = -(-FIXED_DRAWS // len(moments))
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor(moments).chunk(2, dim=1)[0].repeat(repeats, 1, 1, 1)
    noise = torch.randn(means.shape, generator=generator)
    places = torch.randperm(len(means), generator=generator)
    timesteps = (places + 0.5) / len(means) * noise_scheduler.config.num_train_timesteps
    label = None if labels is None else torch.from_numpy(labels).repeat(repeats).to(device)
    return FixedDraws(scale(means, vae).to(device), noise.to(device), timesteps.long().to(device), label)


def alike(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places of as many photos as `wanted` has labels, of the same classes, evenly over each; again where a class has too few, and of any
    class where it has none."""
    chosen = []
    for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        own = np.flatnonzero(labels == label) if label in labels else np.arange(len(labels))
        chosen.append(np.resize(own[evenly(len(own), count)], count))
    return np.sort(np.concatenate(chosen))


@torch.no_grad()
def measure(unet: UNet2DModel, noise_scheduler: DDPMScheduler, draws: FixedDraws) -> dict[str, float]:
    """The mean denoising loss over the fixed draws, and over those of each quarter of the timesteps, clean ones first."""
    losses = []
    for rows in torch.arange(len(draws.latents)).split(64):
        part = draws.latents[rows], draws.noise[rows], draws.timesteps[rows]
        prediction = unet(noise_scheduler.add_noise(*part), part[2], None if draws.labels is None else draws.labels[rows]).sample
        losses.append(denoising_loss(prediction, prediction_target(noise_scheduler, *part)))
    losses = torch.cat(losses)
    bands = draws.timesteps * BANDS // noise_scheduler.config.num_train_timesteps
    return {"loss": float(losses.mean())} | {f"loss_{band + 1}": float(losses[bands == band].mean()) for band in range(BANDS)}


def gauge(unet: UNet2DModel, noise_scheduler: DDPMScheduler, seen: FixedDraws, held_out: FixedDraws) -> dict[str, float]:
    """The losses of photos that are trained on and of held-out ones at the same noise, and the second over the first.

    As long as the model learns what photos have in common, the ratio stays where it was; it rises when the model learns these photos.
    """
    on_seen, on_held_out = measure(unet, noise_scheduler, seen), measure(unet, noise_scheduler, held_out)
    values = {f"val_{name}": value for name, value in on_held_out.items()} | {f"seen_{name}": value for name, value in on_seen.items()}
    return values | {name.replace("loss", "gauge"): on_held_out[name] / on_seen[name] for name in on_seen}


def healthy_gauge(history: list[dict]) -> float:
    """The gauge's lowest value, of validations whose held-out loss came within 5 % of the lowest. At a run's first ones it says nothing:
    what a model that has learned nothing yet gets wrong depends on how bright photos are."""
    lowest = min(record["val_loss"] for record in history)
    return min(record["gauge"] for record in history if record["val_loss"] <= 1.05 * lowest)


def stop_reason(args: UNetArguments, state: RunState, history: list[dict]) -> str:
    """Why the run should stop before its end, or ""."""
    if args.early_stopping_patience is None:  # a run of minutes, whose learning rate falls to the end
        published = best_record(history)["seconds"] if history else 0.0
        if history and history[-1]["seconds"] - published > GIVEN_UP_AFTER * 60 * args.max_train_minutes:
            return "it learns the photos by heart, and nothing later would be published; --early-stopping-patience 0 goes on"
    return early_stop(state, args.early_stopping_patience, args.oscillation_window, args.oscillation_threshold)


def samples(pipe: CorelPipeline, seed: int, labels: list[str | None], steps: int = 20) -> list[Image.Image]:
    """A picture for each label, by the shipped pipeline with DPM-Solver++."""
    parts = pipe.components | {"scheduler": build_sampler("dpm-solver++", pipe.scheduler)}  # of an older version's pipeline, its own
    drawing = type(pipe)(**parts, class_names=pipe.config.class_names).to(pipe.unet.device)
    drawing.set_progress_bar_config(disable=True)
    wanted = labels if pipe.config.class_names else None
    pictures = drawing(len(labels), wanted, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images
    if parts.get("guide"):
        parts["guide"].to("cpu")  # the GPU's memory is the training's
    return pictures


def sample_grid(pipe: CorelPipeline, seed: int, pictures: int) -> Image.Image:
    """About so many samples: as many of each of the first twelve classes, a labelled row for each."""
    names = list((pipe.config.class_names or {}).values())[:12]
    per_class = max(2, pictures // len(names)) if names else 4
    labels = [name for name in names for _ in range(per_class)] or [None] * pictures
    return picture_grid(samples(pipe, seed, labels), per_class, names)


if __name__ == "__main__":
    with one_line_errors(), explained_failures(arguments):
        main(arguments)
