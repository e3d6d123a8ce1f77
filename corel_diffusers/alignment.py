"""Alignment: what the UNet makes of a noisy photo half way through is drawn towards what a frozen network sees in the clean one.

Yu et al. 2025 (REPA, arXiv:2410.06940): a model that has to find this by denoising alone spends most of its training on it.
"""

import numpy as np
import torch
from torch.nn import functional as F

from corel_diffusers.data.cache import ALONE, Shards, Share
from corel_diffusers.data.transforms import Pixels
from corel_diffusers.data.views import Views, cache_versions, channel_statistics
from corel_diffusers.perceptual import EfficientNetLiteFeatures, enlarged

LOOKED_AT_PX = 128  # photos are enlarged to this: the network was trained on larger ones


def cache_features(
    pixels: Pixels,
    views: Views | None,
    grid: tuple[int, int],
    device: torch.device,
    batch_size: int = 32,
    share: Share = ALONE,
) -> Shards:
    """EfficientNet-Lite0's features at 1/16 of each version of each photo, on the grid or, where it is finer, as they are: cached, float32
    (N, 2 + 2V, F, h, w)."""
    network = EfficientNetLiteFeatures().eval().requires_grad_(False).to(device)

    def features(pictures: torch.Tensor) -> torch.Tensor:
        seen = network(enlarged(pictures, LOOKED_AT_PX))[-1]
        return F.adaptive_avg_pool2d(seen, [min(sides) for sides in zip(grid, seen.shape[-2:], strict=True)])

    return cache_versions(f"features-{'x'.join(map(str, grid))}", features, pixels, views, device, batch_size, share)


def feature_scale(features: Shards, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature over photos and positions, (1, F, 1, 1)."""
    mean, variance = channel_statistics(features)
    values = mean, np.sqrt(np.maximum(variance, 1e-12))
    return tuple(torch.from_numpy(value).float().view(1, -1, 1, 1).to(device) for value in values)


def misalignment(guess: torch.Tensor, features: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the guess (B, F, h, w) and the standardised features, repeated where coarser, averaged over positions -> (B,)."""
    wanted = F.interpolate((features - mean) / std, guess.shape[-2:])
    return 1 - F.cosine_similarity(guess.float(), wanted, dim=1).mean((1, 2))
