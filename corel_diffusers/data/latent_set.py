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
from corel_diffusers.data.batches import BatchPlan, preload, training_batches
from corel_diffusers.data.cache import Share
from corel_diffusers.data.features import cache_features, feature_scale
from corel_diffusers.data.latents import cache_moments
from corel_diffusers.data.mixed_sizes import Array, MixedArray, parts_of
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.models.configs import downsample_factor
from corel_diffusers.models.unet import inner_stride


@dataclass
class LatentSet:
    """The photos as posteriors of the VAE, with labels, crop parameters and features.

    With several image sizes, h, w, h' and w' depend on the photo.
    """

    moments: dict[str, Array | MixedArray]  # by split, (N, 2 + 2V, 2C, h, w): C means, C log-variances of each version
    labels: dict[str, np.ndarray]  # by split, (N,)
    crop_params: np.ndarray  # of the training photos, (N, 2 + 2V, P); P is 0 without augmented crops
    features: (
        Array | MixedArray
    )  # of the training photos, (N, 2 + 2V, F, h', w'), or (N, 2 + 2V, 0) without --align-weight
    feature_mean: torch.Tensor | None = None  # (1, F, 1, 1)
    feature_std: torch.Tensor | None = None  # (1, F, 1, 1)

    @classmethod
    def of(
        cls,
        args: UNetArguments,
        vae: AutoencoderKL,
        photos: DatasetDict,
        pixels: dict[str, Pixels],
        large: Pixels | None,
        unet: UNet2DModel,
        share: Share,
    ) -> "LatentSet":
        """Encode the photos and, for the training photos, their augmented crops. Everything is cached.

        The features of the frozen network have the height and width of the UNet's inner features.

        Args:
            large: the training photos with more pixels, for augmented crops. None: no augmented crops.
        """
        crops = AugmentedCrops.of(large, args.views, pixels["train"]) if large else None
        moments = {
            split: cache_moments(vae, part, vae.device, crops if split == "train" else None, args.batch_size, share)
            for split, part in pixels.items()
        }
        labels = {split: np.array(part["label"][:]) for split, part in photos.items()}
        num_versions = 2 + 2 * len(crops or ())
        nothing = np.zeros((len(pixels["train"]), num_versions, 0), np.float32)
        crop_params = crops.changes() if crops else nothing
        if not args.align_weight:
            return cls(moments, labels, crop_params, nothing)
        cell_px = downsample_factor(vae) * inner_stride(unet)
        features = cache_features(pixels["train"], crops, cell_px, vae.device, args.batch_size, share)
        return cls(moments, labels, crop_params, features, *feature_scale(features, vae.device))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The (C, h, w) of the latents of a photo of the first image size."""
        _, _, channels, height, width = parts_of(self.moments["train"])[0].shape
        return channels // 2, height, width

    @property
    def num_features(self) -> int:
        """The number of features per position."""
        return parts_of(self.features)[0].shape[2]

    def batches(
        self, args: UNetArguments, plan: BatchPlan, first_step: int, last_step: int | None, device: torch.device
    ) -> Iterator[list[torch.Tensor]]:
        """Return an iterator over the batches of all forward passes: moments, labels, crop parameters, features.

        Args:
            first_step, last_step: see `training_batches`.
        """
        moments = self.moments["train"]
        labels = np.broadcast_to(self.labels["train"][:, None], self.crop_params.shape[:2])
        arrays = preload((moments, labels, self.crop_params, self.features), device)
        pick = partial(
            pick_versions,
            seed=args.seed,
            global_batch=plan.global_batch,
            views=args.views,
            view_chance=args.view_chance,
        )
        return training_batches(plan, first_step, last_step, args.num_workers, *arrays, versions=pick)
