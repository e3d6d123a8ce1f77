"""Which generated pictures are copies of training photos.

A copy is much nearer to one photo than to any other: the distance to the nearest over that to the second nearest. Bonnaire et
al. 2025 (arXiv:2505.17638) count a picture as a copy below 1/3 in pixels. In a network's features, where a shifted copy still
stands out, the ratio below which it counts is calibrated on the photos. The photos are taken as the VAE renders them: its
blur moves features further than the way from one photo to the next, and a model that copies cannot copy what its VAE loses.
Near duplicates among the photos count as one photo: a copy of one is as near to the other.
"""

from dataclasses import dataclass
from itertools import product

import imagehash
import numpy as np
import torch
from PIL import Image

from corel_diffusers.data.duplicates import duplicate_groups
from corel_diffusers.data.transforms import Pixels
from corel_diffusers.evaluation.features import Network, photo_features

PIXEL_RATIO = 1 / 3
COMPARED_PX = 32  # pixels are compared at this size: a copy stays one, and what ten thousand photos are searched as takes 1.2 GB
CROPS = (0.92, 0.84)  # of the side: a photo's centre, corners and the middles of its edges count as the photo


@dataclass
class Nearest:
    """For each picture: its nearest training photo, and the distance to it over that to the second nearest photo."""

    photo: torch.Tensor  # (N,) int64
    second: torch.Tensor  # (N,) int64
    ratio: torch.Tensor  # (N,)

    def share_below(self, ratio: float) -> float:
        return float((self.ratio < ratio).double().mean())


def pixel_versions(photos: np.ndarray) -> list[torch.Tensor]:
    """uint8 (N, H, W, 3) -> pixel vectors of each photo, nine crops of it at each of CROPS, and the mirror image of each: 38 of (N, D)."""
    height, width = photos.shape[1:3]
    boxes = [(0, 0, width, height)]
    for crop in CROPS:
        kept_h, kept_w = round(crop * height), round(crop * width)
        below, beside = height - kept_h, width - kept_w
        for top, left in product((0, below // 2, below), (0, beside // 2, beside)):
            boxes.append((left, top, left + kept_w, top + kept_h))
    seen = [resize(photos, (COMPARED_PX, COMPARED_PX), box) for box in boxes]
    return [torch.from_numpy(np.ascontiguousarray(side).reshape(len(photos), -1)) for part in seen for side in (part, part[:, :, ::-1])]


def resize(pictures: np.ndarray, size_px: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A box of each picture at another size, uint8 (N, *size_px, 3)."""
    size = (size_px[1], size_px[0])
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BILINEAR, box=box)) for p in pictures])


def nearest_photos(pictures: torch.Tensor, photo_views: list[torch.Tensor], groups: torch.Tensor, leave_out_self: bool = False) -> Nearest:
    """pictures (N, D), each view of the photos (M, D) -> the two nearest photos, a photo being as near as its nearest view.

    groups: (M,), the same number for near duplicates; the second photo is of another group. Where there is none, the ratio is infinite:
    nothing stands out. leave_out_self: the pictures are the photos themselves, and a photo's group are not its neighbours.
    """
    pictures = pictures.double()
    distance = torch.full((len(pictures), len(photo_views[0])), float("inf"), dtype=torch.float64)
    for view in photo_views:
        distance = torch.minimum(distance, torch.cdist(pictures, view.double()))
    if leave_out_self:
        distance.masked_fill_(groups[:, None] == groups, float("inf"))
    first, photo = distance.min(1)
    second, other = distance.masked_fill(groups[photo][:, None] == groups, float("inf")).min(1)
    return Nearest(photo, other, torch.where(second.isinf(), float("inf"), first / second.clamp_min(1e-12)))


def pixel_vectors(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, D) at COMPARED_PX."""
    return torch.from_numpy(resize(pictures, (COMPARED_PX, COMPARED_PX)).reshape(len(pictures), -1))


@dataclass
class CopyFinder:
    """The training photos in pixels and in features, and the ratio below which features tell a copy."""

    pixels: list[torch.Tensor]
    features: list[torch.Tensor]
    groups: torch.Tensor  # (M,), near duplicates share a number
    feature_ratio: float

    @classmethod
    def of(cls, photos: Pixels, rendered: Pixels, network: Network) -> "CopyFinder":
        """rendered: the training photos as the VAE renders them; the photos themselves where the pictures were made without one.

        In features a photo counts by itself and its mirror image: the networks see past small crops. The feature ratio is the
        one that 1 % of the photos themselves are below when each is compared with the others: photos of a series that look
        alike set what is not yet a copy.
        """
        hashes = [str(imagehash.phash(Image.fromarray(photo))) for photo in np.asarray(photos.values)]
        groups = torch.tensor(duplicate_groups(hashes))
        features = [photo_features(network, rendered, mirrored) for mirrored in (False, True)]
        own = nearest_photos(features[0], features, groups, leave_out_self=True)
        compared = own.ratio[groups[own.second] != groups]  # of two photos, neither has a second one to be compared with
        ratio = float(torch.quantile(compared, 0.01)) if len(compared) else 0.0
        return cls(pixel_versions(np.asarray(rendered.values)), features, groups, ratio)

    def search(self, pictures: np.ndarray, features: torch.Tensor) -> tuple[Nearest, Nearest]:
        """The nearest photos of pictures, uint8 (N, H, W, 3) with their features (N, D): in pixels, and in features."""
        in_pixels = nearest_photos(pixel_vectors(pictures), self.pixels, self.groups)
        return in_pixels, nearest_photos(features, self.features, self.groups)

    def shares(self, in_pixels: Nearest, in_features: Nearest) -> dict[str, float]:
        """The share of the pictures searched for that count as copies, by either measure."""
        return {"pixels": in_pixels.share_below(PIXEL_RATIO), "features": in_features.share_below(self.feature_ratio)}


def planted_copies(photos: np.ndarray, kept: float = 0.88) -> np.ndarray:
    """Photos mirrored and cropped to a share of the side, off the middle: what a search for copies has to find."""
    height, width = photos.shape[1:3]
    left, top = round((1 - kept) * width / 4), round((1 - kept) * height / 2)
    box = (left, top, left + round(kept * width), top + round(kept * height))
    return np.ascontiguousarray(resize(photos, (height, width), box)[:, :, ::-1])
