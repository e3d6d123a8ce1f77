"""Representation alignment (REPA): pull an inner layer of the UNet towards the features of a frozen network.

The UNet sees the noisy photo and the frozen network sees the clean photo (Yu et al. 2025, arXiv:2410.06940). A model
that has to learn such features by denoising alone spends most of its training on them.
"""

import torch
from torch.nn import functional as F


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
