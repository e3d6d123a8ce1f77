"""Judge a few samples while a model trains."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from corel_diffusers.config.checks import MIN_PHOTOS
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.evaluation.features import Network, as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.kid import kernel_distance
from corel_diffusers.evaluation.memorization import CopyFinder
from corel_diffusers.evaluation.reconstruction import vae_rendering
from corel_diffusers.sampling import previews

NUM_SAMPLES = 48  # for --evaluate-every


def stratified_rows(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of `count` photos with the same class fractions as `labels`, sorted by class: (count,)."""
    return labels.sort(stable=True).indices[torch.arange(count) * len(labels) // count]


@dataclass
class SampleJudge:
    """Measures a few samples while a model trains: KID against the held-out photos, and copies of training photos."""

    network: Network
    held_out: torch.Tensor  # features of the held-out photos
    labels: torch.Tensor  # labels of the held-out photos
    sizes_px: list[tuple[int, int]]  # (height, width) of the held-out photos
    finder: CopyFinder

    @classmethod
    def of(cls, vae: AutoencoderKL, pixels: dict[str, Pixels], labels: torch.Tensor, precision: str) -> "SampleJudge":
        """Prepare the features of the held-out photos and the search for copies.

        Args:
            vae: the VAE that decodes the samples.
            pixels: the photos of the splits train and validation.
            labels: (N,), the labels of the validation photos.
            precision: the precision of the forward passes that generate the samples.
        """
        network = load_network("efficientnet-lite0", vae.device)
        finder = CopyFinder.of(pixels["train"], vae_rendering(vae, pixels["train"], precision), vae.device)
        features, sizes_px = photo_features(network, pixels["validation"]), pixels["validation"].sizes_px()
        return cls(network, features, labels, sizes_px, finder)

    def judge(self, pipe: DiffusionPipeline, seed: int, accelerator: Accelerator) -> dict[str, float]:
        """Generate NUM_SAMPLES samples in the precision of the run, and return their scores.

        They have the classes and the image sizes of the held-out photos.
        """
        labels, names = None, [None] * NUM_SAMPLES
        rows = stratified_rows(self.labels, NUM_SAMPLES)
        if pipe.config.class_names:
            labels = self.labels[rows]
            names = [pipe.config.class_names[str(int(label))] for label in labels]
        with accelerator.autocast():  # only the samples: their features are compared with features in float32
            images = previews.samples(pipe, seed, names, [self.sizes_px[row] for row in rows])
        return self.scores(images, labels)

    def scores(self, images: list[Image.Image], labels: torch.Tensor | None) -> dict[str, float]:
        """Return KID x1000 against the held-out photos and the fractions of copies.

        KID is left out if there are fewer than MIN_PHOTOS held-out photos, or if `kernel_distance` cannot compute it.
        With few samples the values are noisy, so look at their trend.

        labels: of the samples, None if the model has no classes.
        """
        samples = as_array(images)
        features = extract(self.network, samples)
        copies = {
            f"copies_{measure}": fraction
            for measure, fraction in self.finder.shares(*self.finder.search(samples)).items()
        }
        enough = len(self.held_out) >= MIN_PHOTOS
        kid = kernel_distance(features, self.held_out, labels_a=labels, labels_b=self.labels) if enough else None
        return copies if kid is None else {"kid_e3": 1e3 * kid} | copies
