"""Find the samples that are copies of training photos.

A copy is much closer to one photo than to any other photo. The measure is the distance to the nearest photo divided by
the distance to the second nearest photo. In pixels, a sample counts as a copy if this ratio is below 1/3 (Bonnaire et
al. 2025, arXiv:2505.17638). In the features of a network, shifted or recoloured copies are found too. There, the
threshold for the ratio is calibrated on the photos.

The photos are first reconstructed by the VAE, for two reasons. The blur of the VAE changes features by more than the
distance from one photo to the next. And a model cannot copy the details that its VAE loses.

Near duplicates among the photos, mirror images included, count as one photo, because a copy of one is also close to the
other. Photos with little detail can have near hashes although they are different. They do not count as one photo
(`is_near_duplicate`). Otherwise they would form one large group. A new image with little detail would be close to this
one group only, and would count as a copy.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from corel_diffusers.data.duplicates import duplicate_groups, photo_hashes
from corel_diffusers.data.mixed_sizes import Array, MixedArray, stacked
from corel_diffusers.data.pixels import Pixels, evenly_spaced
from corel_diffusers.evaluation.features import (
    NUM_CROPS,
    Network,
    efficientnet_cells,
    efficientnet_crops,
    extract,
    photo_features,
)
from corel_diffusers.evaluation.photo_crops import (
    COARSE_PX,
    FINE_PX,
    Crop,
    crop_image,
    distances,
    is_near_duplicate,
    nearest_crop,
    pixel_crops,
    resize,
)

PIXEL_RATIO = 1 / 3
CANDIDATES = 4  # groups of photos that the fine search compares with each image
# Evenly spaced photos for the calibration. Each one is compared with all photos. More do not change a fraction of 1 %.
CALIBRATION_PHOTOS = 2000


@dataclass
class Nearest:
    """The nearest and second nearest training photo of each image, and the ratio of the two distances.

    The nearest distance is divided by the second nearest distance.
    """

    photo: torch.Tensor  # (N,) int64
    second: torch.Tensor  # (N,) int64
    ratio: torch.Tensor  # (N,)

    def share_below(self, ratio: float) -> float:
        """Return the fraction of images with a smaller ratio."""
        return float((self.ratio < ratio).double().mean())

    def with_file_names(self, files: list[str]) -> list[tuple[str, str, float | None]]:
        """Return (file of the nearest photo, file of the second nearest photo, ratio) for each image.

        An infinite ratio becomes None.
        """
        rows = zip(self.photo.tolist(), self.second.tolist(), self.ratio.tolist(), strict=True)
        return [(files[photo], files[second], ratio if math.isfinite(ratio) else None) for photo, second, ratio in rows]


def two_nearest(distance: torch.Tensor, groups: torch.Tensor) -> Nearest:
    """Return the two nearest photos of each image. The second photo is from a different group than the first.

    If all photos are in one group, the ratio is infinite, so the image does not count as a copy.

    Args:
        distance: (N, M), from each image to each photo.
        groups: (M,), a group number for each photo. Near duplicates have the same number.
    """
    first, photo = distance.min(1)
    second, second_photo = distance.masked_fill(groups[photo][:, None] == groups, float("inf")).min(1)
    return Nearest(photo, second_photo, torch.where(second.isinf(), float("inf"), first / second.clamp_min(1e-12)))


def calibrated_ratio(photo_crops: list[torch.Tensor], groups: torch.Tensor) -> float:
    """Return the ratio that 1 % of the training photos are below when each one is compared with the other photos.

    This calibrates the threshold on photos of a series: they are similar, but they are not copies. The ratio is 0 if
    no photo can be compared with photos of two other groups.

    Args:
        photo_crops: the features (M, D) of each crop of the photos. The first element is the full photos.
        groups: (M,), a group number for each photo. Near duplicates have the same number.
    """
    ratios = []
    # In chunks of 256 photos, because all photos at once would fill the memory.
    for rows in torch.as_tensor(evenly_spaced(len(groups), CALIBRATION_PHOTOS)).split(256):
        distance = distances(photo_crops[0][rows], photo_crops).masked_fill_(groups[rows, None] == groups, float("inf"))
        ratios.append(two_nearest(distance, groups).ratio)
    all_ratios = torch.cat(ratios)
    finite_ratios = all_ratios[all_ratios.isfinite()]
    return float(torch.quantile(finite_ratios, 0.01)) if len(finite_ratios) else 0.0


def nearest_candidates(distance: torch.Tensor, groups: torch.Tensor) -> list[int]:
    """Return the indices of the nearest photos of an image: at most two from each of the CANDIDATES nearest groups.

    distance: (M,), from the image to each photo.
    """
    photos, count_by_group = [], Counter()
    for photo in distance.argsort().tolist():
        group = int(groups[photo])
        if group not in count_by_group and len(count_by_group) == CANDIDATES:
            break
        count_by_group[group] += 1
        if count_by_group[group] <= 2:
            photos.append(photo)
    return photos


class AlignedCrop(NamedTuple):
    """The crop of a photo that is nearest to an image in pixels. `mirrored`: the mirror image of the crop is nearer."""

    image: int  # index of the image
    photo: int  # index of the photo
    crop: Crop
    mirrored: bool


@dataclass
class CopyFinder:
    """The training photos in pixels and in features, and the ratio below which an image is a copy in features."""

    photos: Array | MixedArray  # uint8 (M, H, W, 3), reconstructed by the VAE
    pixels: list[torch.Tensor]
    network: Network
    features: list[torch.Tensor]
    groups: torch.Tensor  # (M,), near duplicates have the same number
    feature_ratio: float

    @classmethod
    def of(cls, photos: Pixels, rendered: Pixels, device: torch.device) -> "CopyFinder":
        """Prepare the search: compute the crops, the groups of near duplicates, the features and the threshold.

        In features, each photo is represented by the full photo, its four corners, and the mirror images of all five.
        Other crops are found in pixels.

        Args:
            photos: the training photos.
            rendered: the training photos as reconstructed by the VAE. If the images come from a model without a VAE,
                give the photos themselves.
            device: the device of the feature network.
        """
        network, crop_network = efficientnet_cells(device), efficientnet_crops(device)
        pixels = pixel_crops(rendered.values)
        hashes = [photo_hashes(Image.fromarray(photo)) for photo in photos.values]
        groups = torch.tensor(duplicate_groups(hashes, partial(is_near_duplicate, pixels)))
        crop_features = [
            photo_features(crop_network, rendered, mirrored).unflatten(1, (NUM_CROPS, -1)).unbind(1)
            for mirrored in (False, True)
        ]
        features = [*crop_features[0], *crop_features[1]]
        return cls(rendered.values, pixels, network, features, groups, calibrated_ratio(features, groups))

    def search(self, images: Sequence[np.ndarray]) -> tuple[Nearest, Nearest]:
        """Return the nearest photos of uint8 images (N, H, W, 3): in pixels, and in features."""
        in_pixels, crops = self.aligned(images)
        return in_pixels, self.in_features(images, crops)

    def in_pixels(self, images: Sequence[np.ndarray]) -> Nearest:
        """Return the nearest photos in pixels, with their crops and mirror images.

        The coarse search compares all photos. The fine search compares the `nearest_candidates`.
        """
        return self.aligned(images)[0]

    def aligned(self, images: Sequence[np.ndarray]) -> tuple[Nearest, list[AlignedCrop]]:
        """Return the result of `in_pixels`, and the crops of the two nearest photos that fit each image best."""
        distance = distances(torch.from_numpy(resize(images, COARSE_PX).reshape(len(images), -1)), self.pixels)
        fine_distance, crops = torch.full_like(distance, math.inf), {}
        for index, image in enumerate(resize(images, FINE_PX)):
            for photo in nearest_candidates(distance[index], self.groups):
                fine_distance[index, photo], *crops[index, photo] = nearest_crop(image, self.photos[photo])
        nearest = two_nearest(fine_distance, self.groups)
        pairs = {
            (index, photo) for photos in (nearest.photo, nearest.second) for index, photo in enumerate(photos.tolist())
        }
        return nearest, [AlignedCrop(*pair, *crops[pair]) for pair in sorted(pairs & crops.keys())]

    def in_features(self, images: Sequence[np.ndarray], crops: Sequence[AlignedCrop] = ()) -> Nearest:
        """Return the nearest photos in features, with their corners and mirror images.

        crops: more crops of the photos to compare, each one with its own image only.
        """
        features = extract(self.network, images)
        distance = distances(features, self.features)
        if crops:
            crop_images = (crop_image(self.photos[crop.photo], crop.crop) for crop in crops)
            crop_features = extract(
                self.network,
                [image[:, ::-1] if crop.mirrored else image for image, crop in zip(crop_images, crops, strict=True)],
            )
            for crop, feature in zip(crops, crop_features, strict=True):
                crop_distance = (features[crop.image].double() - feature.double()).norm()
                distance[crop.image, crop.photo] = torch.minimum(distance[crop.image, crop.photo], crop_distance)
        return two_nearest(distance, self.groups)

    def shares(self, in_pixels: Nearest, in_features: Nearest) -> dict[str, float]:
        """Return the fraction of images that count as copies, in pixels and in features. Takes a result of `search`."""
        return {"pixels": in_pixels.share_below(PIXEL_RATIO), "features": in_features.share_below(self.feature_ratio)}


def planted_copies(photos: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Return mirrored, off-centre crops of photos. A search must find them.

    The crops have 0.93, 0.81 and 0.68 of the side, for a third of the photos each.
    """
    crops = islice(cycle([(0.93, 0.05, 0.01), (0.81, 0.03, 0.13), (0.68, 0.2, 0.07)]), len(photos))
    return stacked([crop_image(photo, crop)[:, ::-1] for photo, crop in zip(photos, crops, strict=True)])
