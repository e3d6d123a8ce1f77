"""Representation alignment (REPA): pull an inner layer of the UNet towards the features of a frozen network.

The UNet sees the noisy photo and the frozen network sees the clean photo (Yu et al. 2025, arXiv:2410.06940). A model
that has to learn such features by denoising alone spends most of its training on them.
"""

import numpy as np
import torch
from torch.nn import functional as F

from corel_diffusers.data.cache import SINGLE_PROCESS, ShardedArray, Share
from corel_diffusers.data.transforms import Pixels
from corel_diffusers.data.views import AugmentedCrops, cache_versions, channel_statistics
from corel_diffusers.perceptual import EfficientNetLiteFeatures, upscale_to

INPUT_SIDE_PX = 128  # smaller photos are enlarged to this side: the network was trained on larger images


def cache_features(
    pixels: Pixels,
    crops: AugmentedCrops | None,
    grid: tuple[int, int],
    device: torch.device,
    batch_size: int = 32,
    share: Share = SINGLE_PROCESS,
) -> ShardedArray:
    """Return EfficientNet-Lite0 features of each version of each photo: cached, float32 (N, 2 + 2V, F, h, w).

    The size of the features is 1/16 of the size of the network's input. They are averaged down to `grid` (height,
    width). If the grid is finer than the features, they are not resized.
    """
    network = EfficientNetLiteFeatures().eval().requires_grad_(False).to(device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        features = network(upscale_to(images, INPUT_SIDE_PX))[-1]
        return F.adaptive_avg_pool2d(features, [min(sides) for sides in zip(grid, features.shape[-2:], strict=True)])

    return cache_versions(f"features-{'x'.join(map(str, grid))}", encode, pixels, crops, device, batch_size, share)


def feature_scale(features: ShardedArray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of each feature over photos and positions: (1, F, 1, 1) each."""
    mean, variance = channel_statistics(features)
    statistics = mean, np.sqrt(np.maximum(variance, 1e-12))
    return tuple(torch.from_numpy(values).float().view(1, -1, 1, 1).to(device) for values in statistics)


def alignment_loss(
    predicted_features: torch.Tensor, target_features: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Return 1 - cosine similarity of predicted and standardised target features, averaged over positions: (B,).

    Args:
        predicted_features: (B, F, h, w).
        target_features: (B, F, h', w'). If they are coarser than the predicted features, each value is repeated.
        mean, std: see `feature_scale`.
    """
    target = F.interpolate((target_features - mean) / std, predicted_features.shape[-2:])
    return 1 - F.cosine_similarity(predicted_features.float(), target, dim=1).mean((1, 2))
