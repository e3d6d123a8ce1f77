"""Frozen networks that turn a picture into one vector: the space in which sets of pictures are compared.

A number in one network's space says nothing beside a number in another's: every report names its features.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from corel_diffusers.data.cache import cached_array
from corel_diffusers.data.transforms import Pixels
from corel_diffusers.files import UserError, first_line, is_out_of_memory
from corel_diffusers.perceptual import load_efficientnet
from corel_diffusers.precision import arithmetic

VIEWS = 5  # of a photo, for the search for copies: the whole and its four corners


@dataclass
class Network:
    """A frozen network on a device: uint8 pictures (B, H, W, 3) -> (B, width)."""

    name: str
    width: int
    device: torch.device
    run: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype = torch.float64  # of its features, once they are taken out of it


def load_network(name: str, device: torch.device) -> Network:
    """ "efficientnet-lite0" (comes with the package), "inception" (what FID and KID are published with) or "dinov2".

    Raises UserError where its weights are neither here nor to be had.
    """
    loaders = {"efficientnet-lite0": efficientnet, "inception": inception, "dinov2": dinov2}
    try:
        return loaders[name](device)
    except Exception as error:  # not installed, no network, not on the Hub
        if is_out_of_memory(error):
            raise
        way_out = "install it and connect once so that its weights are kept, or use --features efficientnet-lite0"
        raise UserError(f"--features {name} cannot be loaded ({first_line(error)}): {way_out}") from None


def efficientnet(device: torch.device) -> Network:
    """Spatial means of the last feature map at 224 px."""
    feature_map = efficientnet_map(device)
    return Network("efficientnet-lite0", 1280, device, lambda pictures: feature_map(pictures).mean((2, 3)))


def efficientnet_places(device: torch.device) -> Network:
    """What is where: means of the last feature map in 3 x 3 overlapping places, each scaled to unit length.

    For the search for copies. One mean of the whole picture holds any plain picture to be near the plainest photo; a copy has the
    same in the same places (`benchmarks/copies.py`).
    """
    feature_map = efficientnet_map(device)
    return Network("efficientnet-lite0-3x3", 9 * 1280, device, lambda pictures: nine_places(feature_map(pictures)), torch.float16)


def efficientnet_crops(device: torch.device) -> Network:
    """What `efficientnet_places` sees of a photo and of its four corners, crops to 7/8 of its side: (B, VIEWS * width).

    At 256 px the map has 8 x 8 places, and 7 x 7 of them are such a crop at 224 px: one pass for all four. Halves, as of ten thousand
    photos they take 2.3 GB with the mirror images.
    """
    feature_map = efficientnet_map(device)

    def run(photos: torch.Tensor) -> torch.Tensor:
        larger = feature_map(photos, 256)
        corners = [larger[:, :, top : top + 7, left : left + 7] for top in (0, 1) for left in (0, 1)]
        return torch.cat([nine_places(part) for part in (feature_map(photos), *corners)], 1)

    return Network("efficientnet-lite0-3x3-crops", VIEWS * 9 * 1280, device, run, torch.float16)


def nine_places(feature_map: torch.Tensor) -> torch.Tensor:
    """(B, C, 7, 7) -> (B, 9 * C), the mean of each of 3 x 3 places at unit length."""
    return F.normalize(F.adaptive_avg_pool2d(feature_map, 3), dim=1).flatten(1)


def efficientnet_map(device: torch.device) -> Callable[..., torch.Tensor]:
    """uint8 (B, H, W, 3) -> the last feature map at 224 px, (B, 1280, 7, 7), or at another multiple of 32 px."""
    network = load_efficientnet().eval().to(device, memory_format=torch.channels_last)

    def run(pictures: torch.Tensor, side_px: int = 224) -> torch.Tensor:
        x = (enlarged(pictures, side_px).permute(0, 3, 1, 2).float() / 255 - 0.498) / 0.502
        return network.extract_features(x.to(device))

    return run


def inception(device: torch.device) -> Network:
    """What the Inception that FID was defined with has before its classifier (Heusel et al. 2017, arXiv:1706.08500)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception", ["2048"]).eval().to(device)  # it resizes to 299 px itself
    return Network("inception", 2048, device, lambda pictures: network(pictures.permute(0, 3, 1, 2).to(device))[0])


def dinov2(device: torch.device, location: str = "facebook/dinov2-small") -> Network:
    """The class token of DINOv2 at 224 px (Stein et al. 2023, arXiv:2306.04675: nearer to what people see than Inception)."""
    from transformers import AutoModel

    network = AutoModel.from_pretrained(location).eval().to(device)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def run(pictures: torch.Tensor) -> torch.Tensor:
        x = (enlarged(pictures, 224).permute(0, 3, 1, 2).float() / 255 - mean) / std
        return network(x.to(device)).last_hidden_state[:, 0]

    return Network("dinov2", network.config.hidden_size, device, run)


def enlarged(pictures: torch.Tensor, side_px: int) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, side, side, 3), bicubic with Pillow, whose filter antialiases (Parmar et al. 2022)."""
    resized = [Image.fromarray(p.numpy()).resize((side_px, side_px), Image.Resampling.BICUBIC) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))


@torch.no_grad()
def extract(network: Network, pictures: np.ndarray, batch_size: int = 32) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> (N, D)."""
    parts = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    return torch.cat([network.run(torch.from_numpy(np.array(part))).to("cpu", network.dtype) for part in parts])


def photo_features(network: Network, pixels: Pixels, mirrored: bool = False) -> torch.Tensor:
    """The features of a split's photos, or of their mirror images: computed once, cached by what the photos hold."""
    key = f"features-{network.name}-{arithmetic(network.device)}-{pixels.key.removeprefix('pixels-')}-{len(pixels)}{'-mirrored' * mirrored}"

    def make(photos: slice) -> np.ndarray:
        values = pixels.values[photos]
        return extract(network, values[:, :, ::-1] if mirrored else values).numpy()

    dtype = torch.empty(0, dtype=network.dtype).numpy().dtype
    return torch.from_numpy(np.asarray(cached_array(key, (len(pixels), network.width), dtype, make, "looking at photos")))


def as_array(pictures: Iterable[Image.Image]) -> np.ndarray:
    """Pictures of one size -> uint8 (N, H, W, 3)."""
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
