"""Build the patch discriminator of the VAE's adversarial loss."""

import torch
from torch import nn


def build_discriminator(width: int = 32) -> nn.Sequential:
    """Return a discriminator of images (B, 3, H, W).

    Its output is one logit per patch of 26 x 26 px, (B, 1, H/4, W/4). A logit above 0 means a real photo.

    It is a PatchGAN (Isola et al. 2017, arXiv:1611.07004, appendix 6.1.2) with fewer stages, because the images are
    small. It has GroupNorm, so that the logits of an image do not depend on the rest of the batch.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for channels, stride in ((width, 2), (2 * width, 1)):
        kernel = 4 if stride == 2 else 3
        layers += [
            nn.Conv2d(channels, 2 * channels, kernel, stride, 1),
            nn.GroupNorm(8, 2 * channels),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1)).to(memory_format=torch.channels_last)
