"""Everything that the UNet is trained on.

A version of a photo is the photo, its mirror image, one of its V augmented crops, or the mirror image of a crop.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from datasets import DatasetDict
from diffusers import AutoencoderKL, UNet2DModel

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.data.augmented_crops import AugmentedCrops, pick_versions
from corel_diffusers.data.batches import Array, BatchPlan, preload, training_batches
from corel_diffusers.data.cache import Share
from corel_diffusers.data.features import cache_features, feature_scale
from corel_diffusers.data.latents import cache_moments
from corel_diffusers.data.pixels import Pixels, cache_large_pixels
from corel_diffusers.models.unet import inner_grid


@dataclass
class LatentSet:
    """The photos as posteriors of the VAE, with labels, crop parameters and features."""

    moments: dict[str, Array]  # by split, (N, 2 + 2V, 2C, h, w): C means, then C log-variances, of each version
    labels: dict[str, np.ndarray]  # by split, (N,)
    crop_params: np.ndarray  # of the training photos, (N, 2 + 2V, P); P is 0 without augmented crops
    features: Array  # of the training photos, (N, 2 + 2V, F, h', w'), or (N, 2 + 2V, 0) without --align-weight
    feature_mean: torch.Tensor | None = None  # (1, F, 1, 1)
    feature_std: torch.Tensor | None = None  # (1, F, 1, 1)

    @classmethod
    def of(
        cls,
        args: UNetArguments,
        vae: AutoencoderKL,
        photos: DatasetDict,
        pixels: dict[str, Pixels],
        unet: UNet2DModel,
        share: Share,
    ) -> "LatentSet":
        """Encode the photos and, for the training photos, their augmented crops. Everything is cached.

        The features of the frozen network have the height and width of the UNet's inner features.
        """
        height_px, width_px = pixels["train"].values.shape[1:3]
        crops = None
        if args.views:
            large_pixels = cache_large_pixels(photos, (height_px, width_px), share)
            crops = AugmentedCrops.of(large_pixels, args.views, height_px)
        moments = {
            split: cache_moments(vae, part, vae.device, crops if split == "train" else None, args.batch_size, share)
            for split, part in pixels.items()
        }
        labels = {split: np.array(part["label"][:]) for split, part in photos.items()}
        versions = moments["train"].shape[:2]  # number of photos, number of versions per photo
        nothing = np.zeros((*versions, 0), np.float32)
        crop_params = crops.changes() if crops else nothing
        if not args.align_weight:
            return cls(moments, labels, crop_params, nothing)
        grid = inner_grid(unet, moments["train"].shape[-2:])
        features = cache_features(pixels["train"], crops, grid, vae.device, args.batch_size, share)
        return cls(moments, labels, crop_params, features, *feature_scale(features, vae.device))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The (C, h, w) of one photo's latents."""
        _, _, channels, height, width = self.moments["train"].shape
        return channels // 2, height, width

    def batches(
        self, args: UNetArguments, plan: BatchPlan, first_step: int, last_step: int | None, device: torch.device
    ) -> Iterator[list[torch.Tensor]]:
        """Return an iterator over the batches of all forward passes: moments, labels, crop parameters, features.

        Args:
            first_step, last_step: see `training_batches`.
        """
        moments = self.moments["train"]
        labels = np.broadcast_to(self.labels["train"][:, None], moments.shape[:2])
        arrays = preload((moments, labels, self.crop_params, self.features), device)
        pick = partial(
            pick_versions,
            seed=args.seed,
            global_batch=plan.global_batch,
            views=args.views,
            view_chance=args.view_chance,
        )
        return training_batches(plan, first_step, last_step, args.num_workers, *arrays, versions=pick)
