"""Cache the features of a frozen network that the UNet's features are aligned with."""

import numpy as np
import torch
from torch.nn import functional as F

from corel_diffusers.data.augmented_crops import AugmentedCrops
from corel_diffusers.data.cache import SINGLE_PROCESS, ShardedArray, Share
from corel_diffusers.data.mixed_sizes import Array, MixedArray
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.data.versions import cache_versions, channel_statistics, for_each_size
from corel_diffusers.models.efficientnet import EfficientNetLiteFeatures, upscale_to

INPUT_SIDE_PX = 128  # smaller photos are enlarged to this side: the network was trained on larger images


def cache_features(
    pixels: Pixels,
    crops: AugmentedCrops | None,
    cell_px: int,
    device: torch.device,
    batch_size: int = 32,
    share: Share = SINGLE_PROCESS,
) -> Array | MixedArray:
    """Return EfficientNet-Lite0 features of each version of each photo: cached, float32 (N, 2 + 2V, F, h, w).

    The size of the features is 1/16 of the size of the network's input. They are averaged down to one feature per
    `cell_px` pixels of the photo in each direction. If this grid is finer than the features, they are not resized.
    """
    network = EfficientNetLiteFeatures().eval().requires_grad_(False).to(device)

    def cache_size(part: Pixels, part_crops: AugmentedCrops | None) -> ShardedArray:
        grid = [side // cell_px for side in part.values.shape[1:3]]

        def encode(images: torch.Tensor) -> torch.Tensor:
            features = network(upscale_to(images, INPUT_SIDE_PX))[-1]
            return F.adaptive_avg_pool2d(
                features, [min(sides) for sides in zip(grid, features.shape[-2:], strict=True)]
            )

        key = f"features-{'x'.join(map(str, grid))}"
        return cache_versions(key, encode, part, part_crops, device, batch_size, share)

    return for_each_size(pixels, crops, cache_size)


def feature_scale(features: Array | MixedArray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of each feature over photos and positions: (1, F, 1, 1) each."""
    mean, variance = channel_statistics(features)
    statistics = mean, np.sqrt(np.maximum(variance, 1e-12))
    return tuple(torch.from_numpy(values).float().view(1, -1, 1, 1).to(device) for values in statistics)
