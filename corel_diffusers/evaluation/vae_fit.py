"""Tell the user of train_unet.py how well the VAE fits the photos."""

import torch
from datasets import DatasetDict
from diffusers import AutoencoderKL

from corel_diffusers.data.cache import Share
from corel_diffusers.data.mixed_sizes import Array, MixedArray
from corel_diffusers.data.pixels import Pixels, are_grey
from corel_diffusers.evaluation.reconstruction import reconstruction_limit
from corel_diffusers.training import advice
from corel_diffusers.training.run import Run
from corel_diffusers.training.start import print_notices


def print_vae_fit(
    run: Run, vae: AutoencoderKL, photos: DatasetDict, held_out: Pixels, moments: Array | MixedArray, share: Share
) -> None:
    """Print the reconstruction error of the VAE, and notices if it does not fit the photos.

    Args:
        held_out: the held-out photos.
        moments: their posteriors, see `cache_moments`.

    Raises:
        UserError: the scale of the latents is wrong.
    """
    args, labels = run.args, torch.tensor(photos["validation"]["label"][:])
    notices = advice.on_scale(vae, moments, args.vae_location)
    if run.accelerator.is_main_process:
        print(reconstruction_limit(vae, held_out, labels, args.mixed_precision))
    if vae.config.in_channels == 1 and not are_grey(photos, share):
        notices.append(
            "the VAE has one channel, so the photos are converted to grey: for colours, train a VAE on these photos"
        )
    notices += advice.on_vae(args.vae_location, photos["validation"]["file_name"][:], args.aspect_buckets)
    print_notices(run.accelerator, notices)
