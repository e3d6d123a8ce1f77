"""Frozen networks that map an image to one feature vector. Sets of images are compared in this feature space.

Numbers in the features of different networks cannot be compared, so every report names its network.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from corel_diffusers.data.cache import cached_array
from corel_diffusers.data.mixed_sizes import stacked
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.files import UserError, first_line
from corel_diffusers.models.efficientnet import load_efficientnet
from corel_diffusers.runtime.precision import arithmetic

NUM_CROPS = 5  # per photo, in the search for copies: the full photo and its four corners


@dataclass
class Network:
    """A frozen network on a device. It maps uint8 images (B, H, W, 3) to features (B, width)."""

    name: str
    width: int
    device: torch.device
    run: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype = torch.float64  # `extract` converts the features to this type


def load_network(name: str, device: torch.device) -> Network:
    """Load a feature network by name.

    Args:
        name: "efficientnet-lite0" (comes with the package), "inception" (published FID and KID values use it) or
            "dinov2".
        device: the device that the network runs on.

    Raises:
        UserError: the weights are not on this machine and cannot be downloaded.
    """
    loaders = {"efficientnet-lite0": efficientnet, "inception": inception, "dinov2": dinov2}
    try:
        network = loaders[name](device)
    except (ImportError, OSError, ValueError) as error:  # not installed, no network connection, or not on the Hub
        hint = (
            f"pip install 'corel_diffusers[{name}]' (in a clone: pip install -e '.[{name}]'), and go online once to "
            "download its weights, or use --features efficientnet-lite0"
        )
        raise UserError(f"--features {name} cannot be loaded ({first_line(error)}): {hint}") from None
    if network.name != name:  # the name is the key of the cached features
        raise ValueError(f"the network {network.name} is loaded as {name}")
    return network


def efficientnet(device: torch.device) -> Network:
    """Load EfficientNet-Lite0. The features are the spatial means of the last feature map at 224 px."""
    feature_map = efficientnet_map(device)
    return Network("efficientnet-lite0", 1280, device, lambda images: feature_map(images).mean((2, 3)))


def efficientnet_cells(device: torch.device) -> Network:
    """Load EfficientNet-Lite0 for the search for copies. The features are the `cell_means` of the last feature map.

    With one mean over the full image, every image with little detail is close to the photo with the least detail. The
    means of cells keep the positions: a copy has the same content in the same positions (`benchmarks/copies.py`).
    """
    feature_map = efficientnet_map(device)
    return Network(
        "efficientnet-lite0-3x3", 9 * 1280, device, lambda images: cell_means(feature_map(images)), torch.float16
    )


def efficientnet_crops(device: torch.device) -> Network:
    """Load the network of `efficientnet_cells` for a photo and its four corners: (B, NUM_CROPS * 9 * 1280).

    Each corner is a crop to 7/8 of the side. At 256 px the feature map has 8 x 8 positions. 7 x 7 of them are such a
    crop at 224 px, so one forward pass is enough for all four corners.

    The features are float16, because those of ten thousand photos and their mirror images take 2.3 GB.
    """
    feature_map = efficientnet_map(device)

    def run(photos: torch.Tensor) -> torch.Tensor:
        larger_map = feature_map(photos, 256)
        corners = [larger_map[:, :, top : top + 7, left : left + 7] for top in (0, 1) for left in (0, 1)]
        return torch.cat([cell_means(crop) for crop in (feature_map(photos), *corners)], 1)

    return Network("efficientnet-lite0-3x3-crops", NUM_CROPS * 9 * 1280, device, run, torch.float16)


def cell_means(feature_map: torch.Tensor) -> torch.Tensor:
    """Average a feature map over 3 x 3 overlapping cells: (B, C, 7, 7) -> (B, 9 * C).

    The mean of each cell is scaled to unit length.
    """
    return F.normalize(F.adaptive_avg_pool2d(feature_map, 3), dim=1).flatten(1)


def efficientnet_map(device: torch.device) -> Callable[..., torch.Tensor]:
    """Load EfficientNet-Lite0 as a function from uint8 images (B, H, W, 3) to its last feature map.

    The feature map is (B, 1280, 7, 7) at the default size of 224 px. Another size must be a multiple of 32 px.
    """
    network = load_efficientnet().eval().to(device, memory_format=torch.channels_last)

    def run(images: torch.Tensor, side_px: int = 224) -> torch.Tensor:
        x = (resize_to(images, side_px).permute(0, 3, 1, 2).float() / 255 - 0.498) / 0.502
        return network.extract_features(x.to(device))

    return run


def inception(device: torch.device) -> Network:
    """Load the Inception network that defines FID (Heusel et al. 2017, arXiv:1706.08500).

    The features are the input of its classifier layer.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # This network resizes images to 299 px itself.
    network = FeatureExtractorInceptionV3("inception", ["2048"]).eval().to(device)
    return Network("inception", 2048, device, lambda images: network(images.permute(0, 3, 1, 2).to(device))[0])


def dinov2(device: torch.device, location: str = "facebook/dinov2-small") -> Network:
    """Load DINOv2 from a Hub id or a folder. The features are its class token at 224 px.

    Distances in these features are closer to human judgement than those of Inception (Stein et al. 2023,
    arXiv:2306.04675).
    """
    from transformers import AutoModel

    network = AutoModel.from_pretrained(location).eval().to(device)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def run(images: torch.Tensor) -> torch.Tensor:
        x = (resize_to(images, 224).permute(0, 3, 1, 2).float() / 255 - mean) / std
        return network(x.to(device)).last_hidden_state[:, 0]

    return Network("dinov2", network.config.hidden_size, device, run)


def resize_to(images: torch.Tensor, side_px: int) -> torch.Tensor:
    """Resize uint8 images (B, H, W, 3) to uint8 (B, side_px, side_px, 3).

    Pillow's bicubic filter is used because it antialiases (Parmar et al. 2022).
    """
    resized = [Image.fromarray(image.numpy()).resize((side_px, side_px), Image.Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized]))


@torch.no_grad()
def extract(network: Network, images: Sequence[np.ndarray], batch_size: int = 32) -> torch.Tensor:
    """Return the features (N, D) of uint8 images (H, W, 3), on the CPU. The images may have several sizes."""
    features = torch.empty(len(images), network.width, dtype=network.dtype)
    for rows, batch in batches_of_one_size(images, batch_size):
        features[rows] = network.run(torch.from_numpy(batch)).to("cpu", network.dtype)
    return features


def batches_of_one_size(images: Sequence[np.ndarray], batch_size: int = 32) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield batches of images that have the same size: their indices, and the images (B, H, W, 3).

    At most `batch_size` consecutive images are read at once.
    """
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        for shape in dict.fromkeys(image.shape for image in batch):
            rows = [index for index, image in enumerate(batch) if image.shape == shape]
            yield [start + index for index in rows], np.stack([batch[index] for index in rows])


def photo_features(network: Network, pixels: Pixels, mirrored: bool = False) -> torch.Tensor:
    """Return the features (N, D) of the photos of a split, or of their mirror images.

    They are computed once and cached. The key depends on the network, on the arithmetic of its device and on the
    content of the photos.
    """
    network_key = f"features-{network.name}-{network.width}-{arithmetic(network.device)}"
    key = f"{network_key}-{pixels.key.removeprefix('pixels-')}-{len(pixels)}{'-mirrored' * mirrored}"

    def make(photos: slice) -> np.ndarray:
        values = pixels.values[photos]
        return extract(network, [image[:, ::-1] for image in values] if mirrored else values).numpy()

    dtype = torch.empty(0, dtype=network.dtype).numpy().dtype
    return torch.from_numpy(
        np.asarray(cached_array(key, (len(pixels), network.width), dtype, make, "computing features"))
    )


def as_array(images: Iterable[Image.Image]) -> np.ndarray | list[np.ndarray]:
    """Convert PIL images to uint8 (N, H, W, 3), or to a list of (H, W, 3) if they have several sizes."""
    return stacked([np.asarray(image.convert("RGB")) for image in images])
