"""Alignment: what the UNet makes of a noisy photo half way through is drawn towards what a frozen network sees in the clean one.

Yu et al. 2025 (REPA, arXiv:2410.06940): a model that has to find this by denoising alone spends most of its training on it.
"""

import numpy as np
import torch
from torch.nn import functional as F

from corel_diffusers.data.transforms import Pixels
from corel_diffusers.data.views import Views, cache_versions
from corel_diffusers.perceptual import EfficientNetLiteFeatures

LOOKED_AT_PX = 128  # photos are enlarged to this: the network was trained on larger ones


def cache_features(pixels: Pixels, views: Views | None, grid: tuple[int, int], device: torch.device) -> np.ndarray:
    """EfficientNet-Lite0's features at 1/16 of each version of each photo, on the grid: memory-mapped float32 (N, 2 + 2V, F, h, w)."""
    network = EfficientNetLiteFeatures().eval().requires_grad_(False).to(device)

    def features(pictures: torch.Tensor) -> torch.Tensor:
        scale = max(1, LOOKED_AT_PX / min(pictures.shape[-2:]))
        pictures = F.interpolate(pictures, scale_factor=scale, mode="bilinear") if scale > 1 else pictures
        return F.adaptive_avg_pool2d(network(pictures)[-1], grid)

    return cache_versions(f"features-{'x'.join(map(str, grid))}", features, pixels, views, device)


def feature_scale(features: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature over photos and positions, (1, F, 1, 1)."""
    total, square = np.zeros((2, features.shape[2]))
    for start in range(0, len(features), 1024):  # in parts: a large cache stays on the disk
        part = features[start : start + 1024].astype(np.float64)
        total += part.sum((0, 1, 3, 4))
        square += (part**2).sum((0, 1, 3, 4))
    count = features.size / features.shape[2]
    mean = total / count
    spread = np.sqrt(np.maximum(square / count - mean**2, 1e-12))
    return tuple(torch.from_numpy(value).float().view(1, -1, 1, 1).to(device) for value in (mean, spread))


def misalignment(guess: torch.Tensor, features: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the guess and the standardised features, both (B, F, h, w), averaged over positions -> (B,)."""
    return 1 - F.cosine_similarity(guess.float(), (features - mean) / std, dim=1).mean((1, 2))
