"""Measure the VAE's reconstructions."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from corel_diffusers.config.checks import MIN_PHOTOS
from corel_diffusers.data.cache import ShardedArray, cached_array
from corel_diffusers.data.latents import config_key, weights_key
from corel_diffusers.data.mixed_sizes import join, stacked
from corel_diffusers.data.pixels import Pixels, evenly_spaced, to_float
from corel_diffusers.evaluation import report
from corel_diffusers.evaluation.features import Network, batches_of_one_size, extract, load_network, photo_features
from corel_diffusers.evaluation.kid import kernel_distance
from corel_diffusers.evaluation.metrics import compare
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.models.vae import decode_latents, encode_photos
from corel_diffusers.plots import to_images
from corel_diffusers.runtime.precision import arithmetic, autocast

# Maximum number of photos of a split: more would hardly change a number, and the kernels grow with its square.
MAX_COMPARED = 1000


def reconstruction_limit(
    vae: AutoencoderKL, held_out: Pixels, labels: torch.Tensor | None = None, precision: str = "no"
) -> str:
    """Return one line with the reconstruction error of the VAE, which is a lower bound for samples.

    The line warns if the error is high.

    Args:
        vae: the VAE.
        held_out: the held-out photos.
        labels: the labels of the held-out photos.
        precision: the precision that samples will be decoded in.
    """
    if len(held_out) < MIN_PHOTOS:
        return f"the VAE was not measured: {len(held_out)} held-out photos are too few"
    network, held_out = load_network("efficientnet-lite0", vae.device), held_out.evenly_spaced(MAX_COMPARED)
    labels = None if labels is None else labels[evenly_spaced(len(labels), MAX_COMPARED)]
    reconstructions = reconstruct(vae, held_out.values, precision)
    scores = reconstruction_scores(reconstructions, held_out.values, network, photo_features(network, held_out), labels)
    kid = f"KID x1000 {report.with_interval(scores)} ({network.name})"
    line = (
        f"the VAE reconstructs held-out photos with PSNR {scores['psnr_db']:.1f} dB, {kid}: "
        "samples cannot be expected to be closer to the photos"
    )
    return line + ("; that is poor: train the VAE longer first" if report.is_poor(scores) else "")


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL, photos: Sequence[np.ndarray], precision: str = "no"
) -> np.ndarray | list[np.ndarray]:
    """Encode photos to the posterior mean and decode it: uint8 (N, H, W, 3) -> uint8 (N, H, W, 3).

    Photos of several sizes give a list of (H, W, 3). Photos are encoded like the UNet's training photos, and decoded in
    the precision of the samples. Otherwise rounding would make a difference between reconstructions and samples.
    """
    reconstructions = [None] * len(photos)
    decoder_precision = "no" if vae.config.force_upcast else precision  # like the pipeline
    for rows, batch in batches_of_one_size(photos):
        images = to_float(torch.from_numpy(batch)).to(vae.device, vae.dtype)
        with autocast("no", vae.device.type):
            latents = encode_photos(vae, images).mean
        with autocast(decoder_precision, vae.device.type):
            decoded = to_images(decode_latents(vae, latents))
        for row, image in zip(rows, decoded, strict=True):
            reconstructions[row] = np.asarray(image)
    return stacked(reconstructions)


def vae_rendering(vae: AutoencoderKL, pixels: Pixels, precision: str = "no") -> Pixels:
    """Return the photos of a split as reconstructed by the VAE in this precision.

    They are computed once and cached. The key depends on the content of the photos, the VAE's weights and config, the
    arithmetic of the device, and the precision.
    """
    vae_key = f"{weights_key(vae)}-{config_key(vae)}-{arithmetic(vae.device)}-{precision}"

    def rendered(part: Pixels) -> ShardedArray:
        def make(photos: slice) -> np.ndarray:
            return reconstruct(vae, part.values[photos], precision)

        key = f"{part.key}-{len(part)}-{vae_key}"
        return cached_array(key, part.values.shape, np.uint8, make, "reconstructing photos")

    values = join([(rows, rendered(part)) for rows, part in pixels.by_size()])
    return Pixels(values, f"{pixels.key}-{len(pixels)}-{vae_key}")


def reconstruction_scores(
    reconstructions: Sequence[np.ndarray],
    photos: Sequence[np.ndarray],
    network: Network,
    real_features: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> dict[str, float | None]:
    """Return the reconstruction error of the VAE: PSNR (dB), SSIM, perceptual distance, and the results of `compare`.

    The distances are a lower bound for samples. Samples can be below it only by chance.

    KID does not count the pairs of a photo and its own reconstruction. `kid_e3_all_pairs` counts them, so it is too
    low.

    Args:
        reconstructions: uint8 (N, H, W, 3), or a list of (H, W, 3).
        photos: the same photos, in the same order.
        network: the feature network.
        real_features: the features of the photos (N, D).
        labels: the labels of the photos (N,).
    """
    perceptual_loss, sums = PerceptualLoss("efficientnet-lite0").to(network.device), np.zeros(3)
    for rows, batch in batches_of_one_size(reconstructions):
        originals = np.stack([photos[row] for row in rows])
        a, b = (to_float(torch.from_numpy(values)).to(network.device) for values in (batch, originals))
        with torch.no_grad():
            perceptual = perceptual_loss(a, b)
        a, b = (a + 1) / 2, (b + 1) / 2
        psnr_and_ssim = (
            peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3)),
            structural_similarity_index_measure(a, b, data_range=1.0),
        )
        sums += [len(a) * float(value) for value in (*psnr_and_ssim, perceptual)]
    features = extract(network, reconstructions)
    means = dict(zip(("psnr_db", "ssim", "perceptual"), (sums / len(reconstructions)).tolist(), strict=True))
    all_pairs = kernel_distance(features, real_features, labels_a=labels, labels_b=labels)
    distances = compare(features, real_features, True, labels, labels)
    return means | distances | {"kid_e3_all_pairs": None if all_pairs is None else 1e3 * all_pairs}
