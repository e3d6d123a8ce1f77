"""Validate a VAE on the held-out photos."""

import math

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.losses.vae import loss_terms, weighted_sum
from corel_diffusers.models.vae import decode_latents, encode_photos
from corel_diffusers.runtime.processes import broadcast_from_main


@torch.no_grad()
def validate(
    args: VAEArguments,
    accelerator: Accelerator,
    perceptual: PerceptualLoss | None,
    vae: AutoencoderKL,
    held_out: Pixels,
) -> dict[str, float]:
    """Return the mean losses and metrics over the held-out photos, reconstructed from the posterior's mean.

    `val_loss` decides which epoch is the best. It is the loss with the final KL weight. With --kl-target, the KL term
    is log(KL / target) if the KL is above the target, and 0 otherwise. Otherwise an early epoch, whose KL is still
    too high, could have the lowest loss.
    """
    sums: dict[str, float] = {}
    for _, batch in held_out.batches(args.batch_size):
        photos = batch.to(accelerator.device)
        with accelerator.autocast():
            posterior = encode_photos(vae, photos)
            reconstruction = decode_latents(vae, posterior.mean)
            outputs = [values.float() for values in (reconstruction, posterior.mean, posterior.logvar)]
        terms = loss_terms(args, accelerator, perceptual, photos, *outputs)
        image_pairs = (outputs[0].clamp(-1, 1) + 1) / 2, (photos + 1) / 2
        terms["psnr"] = peak_signal_noise_ratio(*image_pairs, data_range=1.0, dim=(1, 2, 3))
        terms["ssim"] = structural_similarity_index_measure(*image_pairs, data_range=1.0)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(photos)
    means = {name: value / len(held_out) for name, value in sums.items()}
    kl_term = max(0.0, math.log(means["kl"] / args.kl_target)) if args.kl_target else args.kl_weight * means["kl"]
    loss = weighted_sum(means, args) + kl_term
    values = {"val_loss": loss} | {f"val_{name}": value for name, value in means.items()}
    return broadcast_from_main(accelerator, values)
