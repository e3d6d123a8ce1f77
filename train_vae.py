"""Trains an AutoencoderKL from scratch on photos: parse, data, model, loop, save.

python train_vae.py --data-dir training_data/corel/corel_all --output-dir vae_models
accelerate launch train_vae.py --data-dir training_data/corel/corel_all --output-dir vae_models
"""

from corel_diffusers.arguments import VAEArguments, parse
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

from corel_diffusers import advice
from corel_diffusers.batches import BatchPlan, StepRandom, batches, resident, to_device
from corel_diffusers.checkpoints import Trained, find_resume, load_checkpoint, mark_finished, run_settings, save_checkpoint
from corel_diffusers.cuda_graphs import recorded
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import Pixels, cache_large_pixels, cache_pixels, random_views
from corel_diffusers.data.views import STATISTICS_OF, STOPPED_STATISTICS_OF
from corel_diffusers.files import UserError, best_record, published_model, read_json, write_json
from corel_diffusers.latents import cache_moments, measure_scale
from corel_diffusers.learning_rate import LearningRate
from corel_diffusers.losses import (
    controlled_kl_weight,
    discriminator_loss,
    kl_divergence,
    kl_warmup,
    reconstruction_loss,
    with_adversarial,
)
from corel_diffusers.models import VAEWithPosterior, build_discriminator, build_vae, check_size, downsample_factor, parameter_count
from corel_diffusers.muon import Together, build_optimizer
from corel_diffusers.perceptual import PerceptualLoss
from corel_diffusers.planning import VAE_LADDER, settle
from corel_diffusers.plots import picture_grid, plot_history, save_picture, to_pictures
from corel_diffusers.processes import of_main_process
from corel_diffusers.sharding import is_sharded
from corel_diffusers.training import (
    Compilation,
    RunLength,
    RunningMean,
    StopSignal,
    build_ema,
    cache_share,
    checkpoint_due,
    clip_gradients,
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
)

PANELS = {
    # of whole photos and the posterior's mean, by the averaged weights
    "held-out photos": {"val_reconstruction": "reconstruction", "val_perceptual": "perceptual"},
    "PSNR (dB)": {"val_psnr": "held-out photos"},
    "KL (nats a photo)": {"val_kl": "held-out photos"},
    # of varied photos and drawn latents, by the weights of each step: not to be read beside the above
    "in training": {"reconstruction": "reconstruction", "perceptual": "perceptual"},
    "KL in training": {"kl": "varied photos"},
    "adversarial": {"adversarial": "decoder", "discriminator": "discriminator"},
}
IN_TRAINING = ("loss", "reconstruction", "perceptual", "kl")  # in the progress bar and in panels of their own
DISCRIMINATOR_LEAD = 0.1  # of the run: so long it learns before its verdict counts


def main(args: VAEArguments) -> None:
    began = time.monotonic()
    accelerator = start_run(args)
    if is_sharded(accelerator):
        raise UserError("--use_fsdp is for a UNet whose training one GPU cannot hold: launch train_vae.py without it")
    device = accelerator.device

    # data
    with accelerator.local_main_process_first():
        photos = load_photos(args.photo_source, classes=args.classes, max_train_samples=args.max_train_samples)
        photos.pop("test", None)  # what `evaluate` reports on is not even looked at
    settle(args, accelerator, photos, VAE_LADDER, partial(trial_step, args, accelerator), args.size_px)
    size_px = args.size_px
    torch.manual_seed(args.seed)  # the model comes before the decoding: a size that it cannot take is refused at once
    vae = build_vae(args.config, size_px, args.latent_dim, args.downsample)
    share = cache_share(accelerator)
    photos, pixels = cache_pixels(photos, size_px, share)
    large = cache_large_pixels(photos, size_px, share) if args.crop_chance else pixels["train"]
    plan = BatchPlan.of(args, accelerator, len(pixels["train"]))
    settings = run_settings(args, photos, "vae", size_px=size_px, global_batch=plan.global_batch)
    checkpoint = find_resume(accelerator, args, settings)

    # model
    latent_shape = (vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    perceptual = PerceptualLoss(args.perceptual_network).to(device, memory_format=torch.channels_last) if args.perceptual else None
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    model, perceptual_pass = recorded_passes(
        args, accelerator, VAEWithPosterior(vae, bool(args.adversarial_weight)), perceptual, *zero_batch(args.batch_size, size_px, vae)
    )
    optimizer = build_optimizer(args.optimizer, model, args.learning_rate, args.weight_decay, args.MUON_SCALE)
    model, discriminator = accelerator.prepare(model), build_discriminator() if args.adversarial_weight else None
    trained = [Trained("model", model, optimizer)]
    if discriminator:
        its_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=args.learning_rate, betas=(0.5, 0.9), fused=True)
        discriminator = accelerator.prepare(discriminator)
        trained.append(Trained("discriminator", discriminator, its_optimizer))
        optimizer = Together(optimizer, its_optimizer)  # one step of both, after both passes: fp16's scale must not change in between
    optimizer = accelerator.prepare(optimizer)
    ema, parameters = build_ema(args, model), list(model.parameters())  # finding them takes longer than averaging them
    rate = LearningRate([part.optimizer for part in trained], args)
    try:
        check_size(size_px, 4 * downsample_factor(vae), "the presets' UNets, which halve the latents twice,")
    except UserError as error:
        accelerator.print(f"notice: {error}, or a UNet of your own")
    print_data_and_model(accelerator, photos, size_px, f"VAE of {parameter_count(vae)}, latents {'x'.join(map(str, latent_shape))}")

    # loop
    state = load_checkpoint(accelerator, checkpoint, trained, rate, ema)
    length = RunLength.of(args, plan, accelerator, state, began)
    history = open_history(accelerator, args, state, "train_vae.py", photos)
    kl_weight = torch.tensor(state.kl_weight or args.kl_weight, device=device)
    means, stop = RunningMean(state, device), StopSignal()
    validate_every = epochs_between_validations(args, plan, len(pixels["validation"]))
    compilation = Compilation(args, accelerator, model, state)
    arrays = pixels["train"].values, large.values
    passes = batches(plan, state.step, length.steps, args.num_workers, *resident(arrays, device))
    with progress_bar(plan, state, length, accelerator) as bar:
        while not length.reached(state):
            rate.set(state.step, length.total_steps(state))
            if not args.kl_target:
                warmup_steps = args.kl_warmup * plan.steps_per_epoch
                kl_weight.fill_(kl_warmup(args.kl_weight, max(state.step, 3 * length.share(state) * warmup_steps), warmup_steps))
            early = args.adversarial_start - length.share(state)  # so much of the run before the discriminator's verdict counts
            kl = 0.0
            for micro_step in range(args.grad_accum):
                random = StepRandom(args.seed, state.step, plan.global_batch, plan.rows(micro_step))
                fitted, whole = (to_device(values, device) for values in next(passes))
                jitter = to_device(args.colour_jitter * (2 * random.uniform(2) - 1), device)
                batch = random_views(whole, fitted, random.chance(args.crop_chance), random.uniform(3), jitter)  # (B, 3, H, W)
                batch = torch.where(to_device(random.chance(0.5), device).view(-1, 1, 1, 1), batch.flip(-1), batch)
                with accelerator.accumulate(*(part.model for part in trained)):
                    with accelerator.autocast():
                        reconstruction, mean, logvar, drawn_from = model(batch, to_device(random.normal(*latent_shape), device))
                    terms = loss_terms(args, accelerator, perceptual_pass, batch, reconstruction, mean, logvar)
                    loss = towards = terms["reconstruction"] + args.perceptual_weight * terms.get("perceptual", 0)
                    if discriminator and early <= 0:  # only the VAE learns from it
                        critic = accelerator.unwrap_model(discriminator).requires_grad_(False)
                        terms["adversarial"] = -critic(reconstruction).mean()
                        critic.requires_grad_(True)
                        loss_scale = accelerator.scaler.scale(torch.ones((), device=device)) if accelerator.scaler else 1.0
                        strength, last_layer = args.adversarial_weight, vae.decoder.conv_out
                        loss, towards = with_adversarial(
                            loss, terms["adversarial"], strength, reconstruction, last_layer, drawn_from, loss_scale
                        )
                    loss = loss + kl_weight * terms["kl"]
                    accelerator.backward(towards + kl_weight * terms["kl"])
                    if discriminator and early <= DISCRIMINATOR_LEAD:  # only the discriminator learns from it
                        verdicts = discriminator(torch.cat([batch, reconstruction.detach()])).float()
                        terms["discriminator"] = discriminator_loss(*verdicts.chunk(2))
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

            epoch, over = plan.epoch(state.step), length.reached(state)
            if over or plan.ends_epoch(state.step, validate_every):
                shown = pictures_due(args, epoch, validate_every, length, state, history)
                with ema_weights(ema, model):
                    values = validate(args, accelerator, perceptual, vae, pixels["validation"])
                    best = note_validation(state, values["val_loss"])
                    # what a discriminator has made better is not in the loss: the last is published
                    published = best or bool(discriminator and early <= 0)
                    if published and accelerator.is_main_process:
                        with published_model(args.run_dir) as folder:
                            vae.save_pretrained(folder)
                    if shown and accelerator.is_main_process:
                        write_pictures(args, accelerator, vae, pixels["validation"], epoch)
                rate.validated(values["val_loss"])
                values = (
                    means.close(accelerator) | values | {"kl_weight": float(kl_weight), "learning_rate": rate.now, "published": published}
                )
                record_epoch(accelerator, args, plan, state, history, bar, values, shown, apart=IN_TRAINING)

            stopping = stop.received(accelerator, state)
            if stopping or over or checkpoint_due(args, plan, state, length):
                state.kl_weight = float(kl_weight)
                means.store(state, accelerator)
                save_checkpoint(accelerator, args, state, settings, trained, rate, ema)
                if accelerator.is_main_process:
                    lines = {"KL (nats a photo)": [(args.kl_target, "target")]} if args.kl_target else None
                    plot_history(history, PANELS, args.run_dir / "training_losses.png", lines)
            if stopping:
                break

    # save
    if accelerator.is_main_process and history:
        vae = AutoencoderKL.from_pretrained(args.run_dir).to(device, memory_format=torch.channels_last)
        looked_at = STOPPED_STATISTICS_OF if stop.number else STATISTICS_OF
        mean, std = measure_scale(cache_moments(vae, pixels["train"].evenly(looked_at), device, batch_size=args.batch_size))
        write_json(args.run_dir / "config.json", read_json(args.run_dir / "config.json") | {"latents_mean": mean, "latents_std": std})
        best = best_record(history)
        print(
            f"{args.run_dir} holds the VAE of epoch {best['epoch']}: held-out PSNR {best['val_psnr']:.2f} dB, SSIM {best['val_ssim']:.3f}"
        )
        for line in advice.on_loss(history, "reconstruction", args) + advice.on_kl(history, args, latent_shape, mean_picture_psnr(pixels)):
            print(f"notice: {line}")
        if not stop.number:
            mark_finished(args)
    accelerator.wait_for_everyone()  # who ends first would have the launcher stop the others, the first process in its last writing
    accelerator.end_training()
    stop.exit(state)


def trial_step(args: VAEArguments, accelerator: Accelerator, config: str, size_px: tuple[int, int], batch_size: int) -> Callable[[], None]:
    """A training step of a fresh VAE on grey photos, to time it."""
    model = VAEWithPosterior(build_vae(config, size_px, args.latent_dim, args.downsample)).to(accelerator.device)
    if args.gradient_checkpointing:
        model.vae.enable_gradient_checkpointing()
    perceptual = (
        PerceptualLoss(args.perceptual_network).to(accelerator.device, memory_format=torch.channels_last) if args.perceptual else None
    )
    optimizer = build_optimizer(args.optimizer, model, 1e-4, args.weight_decay, args.MUON_SCALE)
    photos, noise = (values.to(accelerator.device) for values in zero_batch(batch_size, size_px, model.vae))
    model, perceptual = recorded_passes(args, accelerator, model, perceptual, photos, noise, trial=True)

    def step() -> None:
        with accelerator.autocast():
            terms = loss_terms(args, accelerator, perceptual, photos, *model(photos, noise)[:3])
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero_batch(batch_size: int, size_px: tuple[int, int], vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros in the place of what the model in training takes: photos, noise."""
    noise = torch.zeros(batch_size, vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    return torch.zeros(batch_size, 3, *size_px).to(memory_format=torch.channels_last), noise


def recorded_passes(
    args: VAEArguments,
    accelerator: Accelerator,
    model: VAEWithPosterior,
    perceptual: PerceptualLoss | None,
    photos: torch.Tensor,
    noise: torch.Tensor,
    trial: bool = False,
) -> tuple[VAEWithPosterior, Callable | None]:
    """The model, and the perceptual loss for batches of the size of `photos`, as CUDA graphs where that is faster."""
    model = recorded(args, accelerator, "" if trial else "VAE", model, photos, noise)
    if not perceptual:
        return model, None

    def perceptual_pass(reconstruction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return perceptual(reconstruction, reference)  # itself, it goes on taking batches of any size

    return model, recorded(args, accelerator, "" if trial else "perceptual loss", perceptual_pass, photos.clone().requires_grad_(), photos)


def loss_terms(
    args: VAEArguments,
    accelerator: Accelerator,
    perceptual: Callable | None,
    photos: torch.Tensor,
    reconstruction: torch.Tensor,
    mean: torch.Tensor,
    logvar: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The unweighted terms, each a scalar."""
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
    """Means over the held-out photos, reconstructed from the posterior's mean.

    `val_loss`, which decides what is best: the loss with the KL at its final weight; with --kl-target the KL counts only where
    it is above the target, as log(KL / target), so that no epoch before the controller got there looks best.
    """
    sums: dict[str, float] = {}
    for start in range(0, len(pixels), args.batch_size):
        photos = pixels.batch(slice(start, start + args.batch_size)).to(accelerator.device)
        with accelerator.autocast():
            posterior = vae.encode(photos).latent_dist
            outputs = [values.float() for values in (vae.decode(posterior.mean).sample, posterior.mean, posterior.logvar)]
        terms = loss_terms(args, accelerator, perceptual, photos, *outputs)
        shown = (outputs[0].clamp(-1, 1) + 1) / 2, (photos + 1) / 2
        terms["psnr"] = peak_signal_noise_ratio(*shown, data_range=1.0, dim=(1, 2, 3))
        terms["ssim"] = structural_similarity_index_measure(*shown, data_range=1.0)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(photos)
    values = {f"val_{name}": value / len(pixels) for name, value in sums.items()}
    kl_term = max(0.0, math.log(values["val_kl"] / args.kl_target)) if args.kl_target else args.kl_weight * values["val_kl"]
    loss = values["val_reconstruction"] + args.perceptual_weight * values.get("val_perceptual", 0) + kl_term
    return of_main_process(accelerator, {"val_loss": loss} | values)


@torch.no_grad()
def write_pictures(args: VAEArguments, accelerator: Accelerator, vae: AutoencoderKL, pixels: Pixels, epoch: int) -> None:
    """Held-out photos over their reconstructions, and decoded random latents of the photos' mean and spread a channel."""
    photos = pixels.evenly(8).batch(slice(None)).to(accelerator.device)
    with accelerator.autocast():
        latents = vae.encode(photos).latent_dist.mean
        drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(args.seed)).to(latents)
        drawn = latents.mean((0, 2, 3), keepdim=True) + latents.std((0, 2, 3), keepdim=True) * drawn
        reconstructions, samples = vae.decode(latents).sample, vae.decode(drawn).sample
    name = f"epoch_{epoch:04d}.png"
    over = picture_grid(to_pictures(photos) + to_pictures(reconstructions), len(photos), ["photo", "reconstruction"])
    save_picture(over, args.run_dir / "reconstructions" / name)
    save_picture(picture_grid(to_pictures(samples), 4), args.run_dir / "samples" / name)


def mean_picture_psnr(pixels: dict[str, Pixels]) -> float:
    """PSNR (dB) on held-out photos, at most a thousand, of the mean training photo: what a VAE reaches that knows nothing of the photo."""
    train, at_once = pixels["train"], 256
    total = sum(train.batch(slice(start, start + at_once)).double().sum(0) for start in range(0, len(train), at_once))
    mean, held_out = (total / len(train) + 1) / 2, (pixels["validation"].evenly(1000).batch(slice(None)).double() + 1) / 2
    return float(peak_signal_noise_ratio(mean.expand_as(held_out), held_out, data_range=1.0, dim=(1, 2, 3)))


if __name__ == "__main__":
    with one_line_errors(), explained_failures(arguments):
        main(arguments)
