"""The perceptual distance of two images in the features of a frozen ImageNet network.

The distance is LPIPS (Zhang et al. 2018, arXiv:1801.03924) without the learned channel weights. Features are taken at
several depths and scaled to unit length over the channels at each position. The squared differences are summed over the
channels, averaged over the positions, and then averaged over the depths.
"""

import torch
from torch import nn

from corel_diffusers.files import UserError, first_line
from corel_diffusers.models.efficientnet import EfficientNetLiteFeatures, upscale_to


class PerceptualLoss(nn.Module):
    """Distance of two batches of images in the features of a frozen network: (B, 3, H, W) in [-1, 1] -> scalar.

    Gradients flow to the first batch only.

    On a CPU the distance is always computed in float32. In bf16 it is hardly faster, and its gradient has another
    direction (a cosine of 0.8 with the float32 gradient).

    Args:
        network: "efficientnet-lite0" or "vgg16".
        side_px: smaller images are enlarged to the area of a square with this side, because the networks were trained
            on larger images.

    Raises:
        UserError: the weights of the network cannot be loaded.
    """

    def __init__(self, network: str, side_px: int = 96) -> None:
        super().__init__()
        self.network = (
            {"efficientnet-lite0": EfficientNetLiteFeatures, "vgg16": VGG16Features}[network]()
            .eval()
            .requires_grad_(False)
        )
        self.side_px = side_px

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the features at each depth, scaled to unit length over the channels: (B, F, h, w) each."""
        height, width = images.shape[-2:]
        shorter_side_px = self.side_px * min(height, width) / (height * width) ** 0.5
        features = [f.float() for f in self.network(upscale_to(images, shorter_side_px))]
        # the same as F.normalize, in two thirds of the time
        return [f * f.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt() for f in features]

    def forward(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            with torch.no_grad():
                target_features = self.features(references.float())
            pairs = zip(self.features(images.float()), target_features, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()


class VGG16Features(nn.Module):
    """ImageNet VGG16: the five activations that LPIPS uses. It needs torchvision and its weights."""

    TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchvision.models import VGG16_Weights, vgg16

            self.layers = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features[: self.TAPS[-1] + 1]
        except Exception as error:  # torchvision is missing or does not fit this torch, or its weights are unavailable
            hint = "install torchvision and its weights, or use --perceptual-network efficientnet-lite0"
            raise UserError(f"--perceptual-network vgg16 cannot be loaded ({first_line(error)}): {hint}") from None
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # an in-place ReLU would overwrite an activation that is returned
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = ((images + 1) / 2 - self.mean) / self.std
        features = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.TAPS:
                features.append(x)
        return features
