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
from itertools import cycle, islice, product
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from corel_diffusers.data.cache import ShardedArray
from corel_diffusers.data.duplicates import duplicate_groups, photo_hashes
from corel_diffusers.data.transforms import Pixels, evenly_spaced
from corel_diffusers.evaluation.features import (
    NUM_CROPS,
    Network,
    efficientnet_cells,
    efficientnet_crops,
    extract,
    photo_features,
)

PIXEL_RATIO = 1 / 3
# Evenly spaced photos for the calibration. Each one is compared with all photos. More do not change a fraction of 1 %.
CALIBRATION_PHOTOS = 2000
Crop = tuple[float, float, float]  # scale, left and top, as fractions of the side
# The coarse search compares these crops of every photo. They are so small that ten thousand photos take 0.3 GB.
COARSE_PX = 16
CROPS: list[Crop] = [(1.0, 0.0, 0.0)]
CROPS += [
    (scale, left * (1 - scale), top * (1 - scale))
    for scale in (0.85, 0.7)
    for left, top in product((0, 0.5, 1), repeat=2)
]
# Root mean square difference at COARSE_PX, of 255. It is at most 6 for re-saved photos, at most 12 for slightly cropped
# ones, and more for different photos.
DUPLICATE_LEVELS = 12.0
DUPLICATE_FRACTION = 0.15  # the same as a fraction of the contrast, for duplicates that are brighter or paler
# The fine search compares the `nearest_candidates` of each image at FINE_PX. It refines the three best crops in smaller
# and smaller steps.
FINE_PX, CANDIDATES, STEPS, MIN_SCALE = 32, 4, (0.06, 0.06, 0.03, 0.015), 0.6


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


def pixel_crops(photos: ShardedArray | np.ndarray) -> list[torch.Tensor]:
    """Return uint8 (N, D) at COARSE_PX for each crop in CROPS and for its mirror image.

    photos: uint8 (N, H, W, 3).
    """

    def flat_crops(photo: np.ndarray) -> np.ndarray:
        crops = np.stack([crop_picture(photo, crop, (COARSE_PX, COARSE_PX)) for crop in CROPS])
        return np.stack([crops, crops[:, :, ::-1]], 1).reshape(2 * len(CROPS), -1)

    # One photo at a time, because all photos would fill the memory.
    return list(torch.from_numpy(np.stack([flat_crops(photo) for photo in photos], 1)))


def is_near_duplicate(photo_crops: list[torch.Tensor], photo: int, others: np.ndarray) -> np.ndarray:
    """Return a bool mask (len(others),): which of the other photos are near duplicates of one photo.

    Two photos are near duplicates if the full image of one differs from a crop of the other by less than
    DUPLICATE_LEVELS. A brighter or paler duplicate differs by more. It counts if the difference without the channels'
    means is less than DUPLICATE_FRACTION of the photo's contrast.

    Args:
        photo_crops: the `pixel_crops` of all photos. The first element is the full photos.
        photo: the index of the photo.
        others: the indices of the other photos.
    """

    def centred(images: torch.Tensor) -> torch.Tensor:
        channels = images.unflatten(-1, (-1, 3))
        return (channels - channels.mean(-2, keepdim=True)).flatten(-2)

    def rms(values: torch.Tensor) -> torch.Tensor:
        return values.square().mean(-1).sqrt()

    full, found = photo_crops[0], torch.zeros(len(others), dtype=torch.bool)
    for crop in photo_crops:
        for one, many in ((full[photo], crop[others]), (crop[photo], full[others])):
            one, many = one.float(), many.float()
            limit = min(DUPLICATE_LEVELS, DUPLICATE_FRACTION * float(rms(centred(one))))
            found |= (rms(many - one) < DUPLICATE_LEVELS) | (rms(centred(many) - centred(one)) < limit)
    return found.numpy()


def resize(images: np.ndarray, side_px: int, crop: Crop = CROPS[0]) -> np.ndarray:
    """Resize a crop of each image to a square, without keeping the aspect ratio: uint8 (N, side_px, side_px, 3)."""
    return np.stack([crop_picture(image, crop, (side_px, side_px)) for image in images])


def crop_picture(image: np.ndarray, crop: Crop, size_px: tuple[int, int] | None = None) -> np.ndarray:
    """Return a crop of an image, uint8 (H, W, 3), resized to (height, width). The default is the image's own size."""
    (height, width), (scale, left, top) = image.shape[:2], crop
    size_px = size_px or (height, width)
    box = (left * width, top * height, (left + scale) * width, (top + scale) * height)
    return np.asarray(Image.fromarray(image).resize(size_px[::-1], Image.Resampling.BILINEAR, box=box))


def distances(images: torch.Tensor, photo_crops: list[torch.Tensor]) -> torch.Tensor:
    """Return the distance of each image to each photo: float64 (N, M). The nearest crop of a photo counts.

    images: (N, D). photo_crops: one tensor (M, D) per crop.
    """
    images = images.double()
    # In chunks of 1024 photos, because ten thousand photos as float64 would fill the memory.
    chunks = zip(*(crop.split(1024) for crop in photo_crops), strict=True)
    return torch.cat(
        [torch.stack([torch.cdist(images, crop.double()) for crop in chunk]).amin(0) for chunk in chunks], 1
    )


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


def nearest_crop(image: np.ndarray, photo: np.ndarray) -> tuple[float, Crop, bool]:
    """Find the crop of a photo that is nearest to an image or to the mirror image of the image.

    image: (FINE_PX, FINE_PX, 3). photo: (H, W, 3).

    Returns:
        The distance, the crop, and whether the mirror image is the nearer one.
    """
    image_and_mirror, crops = np.stack([image, image[:, ::-1]]).astype(np.float32), CROPS
    for step in (*STEPS, None):
        photo_crops = np.concatenate([resize(photo[None], FINE_PX, crop) for crop in crops])
        distance = np.sqrt(((photo_crops[:, None] - image_and_mirror) ** 2).sum((2, 3, 4)))  # (crops, 2)
        if step:
            crops = list(
                dict.fromkeys(
                    neighbour
                    for best in distance.min(1).argsort()[:3]
                    for neighbour in neighbouring_crops(crops[best], step)
                )
            )
    best, mirrored = np.unravel_index(distance.argmin(), distance.shape)
    return float(distance.min()), crops[best], bool(mirrored)


def neighbouring_crops(crop: Crop, step: float) -> list[Crop]:
    """Return 27 crops within the photo: scale, left and top are each one step less, the same, or one step more."""
    crops = np.array(crop) + step * np.array(list(product((-1, 0, 1), repeat=3)))
    crops[:, 0] = crops[:, 0].clip(MIN_SCALE, 1)
    crops[:, 1:] = crops[:, 1:].clip(0, 1 - crops[:, :1])
    return list(map(tuple, crops.tolist()))


class AlignedCrop(NamedTuple):
    """The crop of a photo that is nearest to an image in pixels. `mirrored`: the mirror image of the crop is nearer."""

    image: int  # index of the image
    photo: int  # index of the photo
    crop: Crop
    mirrored: bool


@dataclass
class CopyFinder:
    """The training photos in pixels and in features, and the ratio below which an image is a copy in features."""

    photos: ShardedArray | np.ndarray  # uint8 (M, H, W, 3), reconstructed by the VAE
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

    def search(self, images: np.ndarray) -> tuple[Nearest, Nearest]:
        """Return the nearest photos of uint8 images (N, H, W, 3): in pixels, and in features."""
        in_pixels, crops = self.aligned(images)
        return in_pixels, self.in_features(images, crops)

    def in_pixels(self, images: np.ndarray) -> Nearest:
        """Return the nearest photos in pixels, with their crops and mirror images.

        The coarse search compares all photos. The fine search compares the `nearest_candidates`.
        """
        return self.aligned(images)[0]

    def aligned(self, images: np.ndarray) -> tuple[Nearest, list[AlignedCrop]]:
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

    def in_features(self, images: np.ndarray, crops: Sequence[AlignedCrop] = ()) -> Nearest:
        """Return the nearest photos in features, with their corners and mirror images.

        crops: more crops of the photos to compare, each one with its own image only.
        """
        features = extract(self.network, images)
        distance = distances(features, self.features)
        if crops:
            crop_images = (crop_picture(self.photos[crop.photo], crop.crop) for crop in crops)
            crop_features = extract(
                self.network,
                np.stack(
                    [image[:, ::-1] if crop.mirrored else image for image, crop in zip(crop_images, crops, strict=True)]
                ),
            )
            for crop, feature in zip(crops, crop_features, strict=True):
                crop_distance = (features[crop.image].double() - feature.double()).norm()
                distance[crop.image, crop.photo] = torch.minimum(distance[crop.image, crop.photo], crop_distance)
        return two_nearest(distance, self.groups)

    def shares(self, in_pixels: Nearest, in_features: Nearest) -> dict[str, float]:
        """Return the fraction of images that count as copies, in pixels and in features. Takes a result of `search`."""
        return {"pixels": in_pixels.share_below(PIXEL_RATIO), "features": in_features.share_below(self.feature_ratio)}


def planted_copies(photos: np.ndarray) -> np.ndarray:
    """Return mirrored, off-centre crops of photos. A search must find them.

    The crops have 0.93, 0.81 and 0.68 of the side, for a third of the photos each.
    """
    crops = islice(cycle([(0.93, 0.05, 0.01), (0.81, 0.03, 0.13), (0.68, 0.2, 0.07)]), len(photos))
    copies = [crop_picture(photo, crop) for photo, crop in zip(photos, crops, strict=True)]
    return np.ascontiguousarray(np.stack(copies)[:, :, ::-1])
