"""Advice for the user from the measurements of a run: one line for each problem, and no line if there is none."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from diffusers import AutoencoderKL
from torchmetrics.functional.image import peak_signal_noise_ratio

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.borders import black_borders
from corel_diffusers.data.latents import measure_latents
from corel_diffusers.data.mixed_sizes import Array, MixedArray
from corel_diffusers.data.pixels import Pixels, a_few_photos
from corel_diffusers.data.training_photos import count_trained_on
from corel_diffusers.files import UserError, read_json
from corel_diffusers.models.configs import check_size, downsample_factor

# with a PSNR less than this above the PSNR of the mean photo, reconstructions show nothing of the individual photo
COLLAPSED_DB = 1.5
# how many times the standard deviation of latents in the scale of the UNet may differ from 1
ODD_SCALE = 2.5  # with a larger difference, many steps of the noise schedule have nearly only noise, or nearly no noise
UNUSABLE_SCALE = 1000.0  # with a larger difference, all have
DEAD_CHANNEL_KL = 0.02  # nats per latent value: a channel below this is dead
HIGH_KL_PER_VALUE = 8.0  # nats per latent value: the posterior is then about e^-8 wide, so it is nearly a point


def on_loss(history: list[dict], name: str, args: TrainingArguments) -> list[str]:
    """Return advice if a training loss has not fallen by 5 % from the first tenth of the validations to the last tenth.

    history: the records of metrics.jsonl. name: the key of the loss.
    """
    values = [record[name] for record in history if name in record]
    if len(values) < 5:
        return []
    tenth = max(1, len(values) // 10)
    first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    if last < 0.95 * first:
        return []
    rate = args.learning_rate
    if args.lr_warmup_steps >= history[-1]["step"]:
        hint = (
            f"the learning rate still rises: give fewer than --lr-warmup-steps {args.lr_warmup_steps}, or train longer"
        )
    elif last > first:
        hint = f"the learning rate is too high: try --lr {rate / 2:.1g} (was {rate:g})"
    else:
        lengths = {
            "--max-train-minutes": args.max_train_minutes,
            "--max-train-steps": args.max_train_steps,
            "--epochs": history[-1]["epoch"],
        }
        flag, length = next((flag, length) for flag, length in lengths.items() if length)
        hint = f"train longer ({flag} {2 * length:.9g}) or try --lr {rate * 2:.1g} (was {rate:g})"
    return [f"the loss is not falling ({name} {first:.4g} at the start, {last:.4g} at the end): {hint}"]


def on_kl(history: list[dict], args: VAEArguments, latent_shape: tuple[int, ...], mean_photo_psnr: float) -> list[str]:
    """Return advice if the KL is too low (the posterior has collapsed), too high, or not at --kl-target.

    latent_shape: (C, h, w). mean_photo_psnr: PSNR of the mean training photo, measured on the held-out photos.
    """
    latent_values = math.prod(latent_shape)
    last = next((record for record in reversed(history) if "val_kl" in record), None)
    if last is None:
        return []
    kl, psnr, weight = last["val_kl"], last["val_psnr"], last["kl_weight"]
    measured = (
        f"KL {kl:.0f} nats per photo at weight {weight:.2g}, "
        f"held-out PSNR {psnr:.1f} dB, PSNR of the mean photo {mean_photo_psnr:.1f} dB"
    )
    if psnr < mean_photo_psnr + COLLAPSED_DB and kl < 0.1 * latent_values:
        flag = (
            f"raise --kl-target (was {args.kl_target:g})"
            if args.kl_target
            else f"lower --kl-weight (was {args.kl_weight:g}; 0.4 / number of pixels is usually good)"
        )
        return [f"the KL is too low: the latents contain almost no information ({measured}): {flag}"]
    if args.kl_target and not 0.8 < kl / args.kl_target < 1.25:
        return [
            f"the KL is not at its target of {args.kl_target:g} ({measured}): "
            f"train longer, or set --kl-target closer to {kl:.0f}"
        ]
    if kl > HIGH_KL_PER_VALUE * latent_values:
        hint = f"raise --kl-weight (was {args.kl_weight:g}) or set --kl-target {4 * latent_values}"
        return [f"the KL is too high: {kl / latent_values:.1f} nats per latent value ({measured}): {hint}"]
    return []


def on_channels(kl: Sequence[float]) -> list[str]:
    """Return advice if latent channels are dead. kl: nats per latent value of each channel."""
    dead = [number for number, nats in enumerate(kl, 1) if nats < DEAD_CHANNEL_KL]
    if not dead:
        return []
    return [
        f"{len(dead)} of the {len(kl)} latent channels carry almost no information (number "
        f"{', '.join(map(str, dead))}): give --latent-dim {max(1, len(kl) - len(dead))}, or lower --kl-weight"
    ]


def on_latent_size(vae: AutoencoderKL, size_px: tuple[int, int]) -> list[str]:
    """Return advice if the UNet presets cannot take the latents of this VAE, which they halve twice."""
    try:
        check_size(size_px, 4 * downsample_factor(vae), "the UNet presets (they halve the latents twice)")
    except UserError as error:
        return [f"{error}, or use your own UNet config"]
    return []


def on_grey(args: VAEArguments, grey: bool) -> list[str]:
    """Return a line if the VAE is built for grey photos and the user did not ask for it."""
    if not grey or args.grey:
        return []
    return ["all photos are grey, so the VAE has one channel and generates grey images: --no-grey gives it three"]


def on_borders(part: Dataset) -> list[str]:
    """Return advice if more than half of a few photos have black borders, which the models would learn to draw."""
    have_borders = [any(black_borders(np.asarray(photo))) for photo in a_few_photos(part)]
    if 2 * sum(have_borders) <= len(have_borders):
        return []
    return [
        f"{sum(have_borders)} of {len(have_borders)} photos that were looked at have black borders: "
        "corel-diffusers prepare cuts them off"
    ]


def on_vae(location: Path | str, held_out: Sequence[str], aspect_buckets: bool = False) -> list[str]:
    """Return advice if the VAE was stopped early, was trained on held-out photos, or was trained on more image sizes.

    Args:
        location: the folder of the VAE or its Hub id.
        held_out: the file names of the held-out photos.
        aspect_buckets: whether the UNet is trained on several image sizes.
    """
    lines, file = [], Path(location) / "run.json"
    run = read_json(file) if file.is_file() else {"finished": True}
    if len(run.get("sizes_px", ())) > 1 and not aspect_buckets:
        lines.append(
            "the VAE was trained with --aspect-buckets, and this UNet is trained on the centre of each photo: "
            "give --aspect-buckets to train it on full photos"
        )
    if not run["finished"]:
        lines.append(
            "the training of the VAE was stopped before its end: "
            "continue it with train_vae.py --resume latest for a better VAE"
        )
    if leaked := count_trained_on(location, held_out):
        lines.append(
            f"the VAE was trained on {leaked} of the held-out photos, "
            "so its measured quality is too high: train a VAE on this split"
        )
    return lines


def on_scale(vae: AutoencoderKL, moments: Array | MixedArray, location: Path | str) -> list[str]:
    """Return advice if the latents do not have the standard deviation that the noise schedule expects, which is 1.

    Args:
        moments: the posteriors of the held-out photos, see `cache_moments`.
        location: the folder of the VAE or its Hub id.

    Raises:
        UserError: the standard deviation of a channel is so far from 1 that no UNet can be trained.
    """
    config = vae.config
    units = config.latents_std or [1.0] * config.latent_channels
    stds = [std / unit * config.scaling_factor for std, unit in zip(measure_latents(moments).std, units, strict=True)]
    shown = f"{min(stds):.3g}" if min(stds) == max(stds) else f"{min(stds):.3g} to {max(stds):.3g}"
    text = f"--vae-checkpoint {location}: in the scale of its config, its latents have a standard deviation of {shown}"
    hint = "correct scaling_factor or latents_std in its config.json"
    if not 1 / UNUSABLE_SCALE < min(stds) <= max(stds) < UNUSABLE_SCALE:
        raise UserError(f"{text}, and no UNet can learn them: {hint}, so that it is 1")
    root_mean_square = math.hypot(*stds) / len(stds) ** 0.5
    return [] if 1 / ODD_SCALE < root_mean_square < ODD_SCALE else [f"{text}: a UNet learns more if it is 1: {hint}"]


def mean_photo_psnr(train: Pixels, held_out: Pixels) -> float:
    """Return the PSNR in dB of the mean training photo, measured on at most 1000 held-out photos.

    It is the PSNR of a VAE whose latents contain no information about the photo. Each image size has its own mean
    photo.
    """
    held_out_by_size = {part.values.shape[1:3]: part for _, part in held_out.evenly_spaced(1000).by_size()}
    sum_psnr, count = 0.0, 0
    for _, part in train.by_size():
        if compared := held_out_by_size.get(part.values.shape[1:3]):
            mean = sum(images.double().sum(0) for _, images in part.batches(256)) / len(part)
            photos = (compared.batch(slice(None)).double() + 1) / 2
            psnr = peak_signal_noise_ratio(((mean + 1) / 2).expand_as(photos), photos, data_range=1.0, dim=(1, 2, 3))
            sum_psnr, count = sum_psnr + len(photos) * float(psnr), count + len(photos)
    return sum_psnr / count if count else math.nan
