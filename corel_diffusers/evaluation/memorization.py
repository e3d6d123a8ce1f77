"""Which generated pictures are copies of training photos.

A copy is much nearer to one photo than to any other: the distance to the nearest over that to the second nearest. Bonnaire et
al. 2025 (arXiv:2505.17638) count a picture as a copy below 1/3 in pixels. In the features of a network, where a shifted or recoloured
copy still stands out, the ratio below which it counts is calibrated on the photos. The photos are taken as the VAE renders them: its
blur moves features further than the way from one photo to the next, and a model that copies cannot copy what its VAE loses.
Near duplicates among the photos, mirror images included, count as one photo: a copy of one is as near to the other. Plain pictures whose
hashes alone are near do not (`really_alike`): beside the only photo of a large group, any novel picture would stand out.
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

from corel_diffusers.data.cache import Shards
from corel_diffusers.data.duplicates import duplicate_groups, photo_hashes
from corel_diffusers.data.transforms import Pixels, evenly
from corel_diffusers.evaluation.features import VIEWS, Network, efficientnet_crops, efficientnet_places, extract, photo_features

PIXEL_RATIO = 1 / 3
CALIBRATED_ON = 2000  # photos, evenly over all: more do not change a share of 1 %, and each is compared with all
Crop = tuple[float, float, float]  # scale, left and top, as shares of the side
# Every photo is looked at in these crops, so small that ten thousand photos take 0.3 GB
COARSE_PX = 16
CROPS: list[Crop] = [(1.0, 0.0, 0.0)]
CROPS += [(scale, left * (1 - scale), top * (1 - scale)) for scale in (0.85, 0.7) for left, top in product((0, 0.5, 1), repeat=2)]
# then a picture's likeliest photos larger, each in crops around its three best ones, in ever smaller steps
ALIKE_LEVELS = (
    12.0  # of 255, root mean square at COARSE_PX: re-saved photos differ by up to 6, closely cropped ones by up to 12, others by more
)
ALIKE_SHARE = 0.15
FINE_PX, LIKELY, STEPS, SMALLEST = 32, 4, (0.06, 0.06, 0.03, 0.015), 0.6


@dataclass
class Nearest:
    """For each picture: its nearest training photo, and the distance to it over that to the second nearest photo."""

    photo: torch.Tensor  # (N,) int64
    second: torch.Tensor  # (N,) int64
    ratio: torch.Tensor  # (N,)

    def share_below(self, ratio: float) -> float:
        return float((self.ratio < ratio).double().mean())

    def named(self, files: list[str]) -> list[tuple[str, str, float | None]]:
        """For each picture the files of its nearest and second nearest photo, and the ratio; None where nothing stands out."""
        rows = zip(self.photo.tolist(), self.second.tolist(), self.ratio.tolist(), strict=True)
        return [(files[photo], files[second], ratio if math.isfinite(ratio) else None) for photo, second, ratio in rows]


def pixel_views(photos: Shards | np.ndarray) -> list[torch.Tensor]:
    """uint8 (N, H, W, 3) -> uint8 (N, D) at COARSE_PX for each of CROPS and its mirror image."""

    def views(photo: np.ndarray) -> np.ndarray:
        seen = np.stack([cropped(photo, crop, (COARSE_PX, COARSE_PX)) for crop in CROPS])
        return np.stack([seen, seen[:, :, ::-1]], 1).reshape(2 * len(CROPS), -1)

    return list(torch.from_numpy(np.stack([views(photo) for photo in photos], 1)))  # one photo at a time: all would fill the memory


def really_alike(photo_views: list[torch.Tensor], photo: int, others: np.ndarray) -> np.ndarray:
    """Whether the whole of a photo differs by less than ALIKE_LEVELS from some view of each of the others, or the other way round:
    (len(others),) bool. photo_views: as `pixel_views` has them.

    A brighter or paler copy differs by more, and once the means of its channels are aside, by less than ALIKE_SHARE of the photo's
    contrast.
    """

    def centred(views: torch.Tensor) -> torch.Tensor:
        channels = views.unflatten(-1, (-1, 3))
        return (channels - channels.mean(-2, keepdim=True)).flatten(-2)

    whole, found = photo_views[0], torch.zeros(len(others), dtype=torch.bool)
    for view in photo_views:
        for one, many in ((whole[photo], view[others]), (view[photo], whole[others])):
            one, many = one.float(), many.float()
            apart = [(b - a).square().mean(-1).sqrt() for a, b in ((one, many), (centred(one), centred(many)))]
            contrast = centred(one).square().mean().sqrt()
            found |= (apart[0] < ALIKE_LEVELS) | (apart[1] < min(ALIKE_LEVELS, ALIKE_SHARE * float(contrast)))
    return found.numpy()


def resize(pictures: np.ndarray, side_px: int, crop: Crop = CROPS[0]) -> np.ndarray:
    """A crop of each picture, squeezed into a square: uint8 (N, side, side, 3)."""
    return np.stack([cropped(picture, crop, (side_px, side_px)) for picture in pictures])


def cropped(picture: np.ndarray, crop: Crop, size_px: tuple[int, int] | None = None) -> np.ndarray:
    """A crop of a picture, uint8 (H, W, 3), at a size (height, width); at the picture's own where none is given."""
    (height, width), (scale, left, top) = picture.shape[:2], crop
    size_px = size_px or (height, width)
    box = (left * width, top * height, (left + scale) * width, (top + scale) * height)
    return np.asarray(Image.fromarray(picture).resize(size_px[::-1], Image.Resampling.BILINEAR, box=box))


def distances(pictures: torch.Tensor, photo_views: list[torch.Tensor]) -> torch.Tensor:
    """pictures (N, D), each view of the photos (M, D) -> (N, M), float64: a photo is as near as its nearest view."""
    pictures = pictures.double()
    parts = zip(*(view.split(1024) for view in photo_views), strict=True)  # all of ten thousand photos as float64 would fill the memory
    return torch.cat([torch.stack([torch.cdist(pictures, view.double()) for view in part]).amin(0) for part in parts], 1)


def two_nearest(distance: torch.Tensor, groups: torch.Tensor) -> Nearest:
    """distance (N, M) of pictures to photos, groups (M,): the same number for near duplicates; the second photo is of another
    group. Where there is none, the ratio is infinite: nothing stands out."""
    first, photo = distance.min(1)
    second, other = distance.masked_fill(groups[photo][:, None] == groups, float("inf")).min(1)
    return Nearest(photo, other, torch.where(second.isinf(), float("inf"), first / second.clamp_min(1e-12)))


def calibrated_ratio(views: list[torch.Tensor], groups: torch.Tensor) -> float:
    """Each view of the photos (M, D), groups (M,) -> the ratio that 1 % of the photos themselves are below when each is compared with
    the others: photos of a series that look alike set what is not yet a copy. 0 where no photo has two others."""
    ratios = []
    for rows in torch.as_tensor(evenly(len(groups), CALIBRATED_ON)).split(256):  # all at once would fill the memory
        others = distances(views[0][rows], views).masked_fill_(groups[rows, None] == groups, float("inf"))
        ratios.append(two_nearest(others, groups).ratio)
    own = torch.cat(ratios)
    compared = own[own.isfinite()]
    return float(torch.quantile(compared, 0.01)) if len(compared) else 0.0


def likeliest(distance: torch.Tensor, groups: torch.Tensor) -> list[int]:
    """distance (M,) of a picture to each photo -> the photos of the LIKELY nearest groups, at most two of each."""
    photos, seen = [], Counter()
    for photo in distance.argsort().tolist():
        group = int(groups[photo])
        if group not in seen and len(seen) == LIKELY:
            break
        seen[group] += 1
        if seen[group] <= 2:
            photos.append(photo)
    return photos


def nearest_crop(picture: np.ndarray, photo: np.ndarray) -> tuple[float, Crop, bool]:
    """picture (FINE_PX, FINE_PX, 3), photo (H, W, 3) -> the distance of the picture, or its mirror image, to the photo's nearest crop; that
    crop, and whether it was the mirror image."""
    either, crops = np.stack([picture, picture[:, ::-1]]).astype(np.float32), CROPS
    for step in (*STEPS, None):
        views = np.concatenate([resize(photo[None], FINE_PX, crop) for crop in crops])
        both = np.sqrt(((views[:, None] - either) ** 2).sum((2, 3, 4)))  # (crops, 2)
        if step:
            crops = list(dict.fromkeys(near for best in both.min(1).argsort()[:3] for near in moved(crops[best], step)))
    best, mirrored = np.unravel_index(both.argmin(), both.shape)
    return float(both.min()), crops[best], bool(mirrored)


def moved(crop: Crop, step: float) -> list[Crop]:
    """The crop with its scale and its place a step less, the same and more: 27, within the photo."""
    crops = np.array(crop) + step * np.array(list(product((-1, 0, 1), repeat=3)))
    crops[:, 0] = crops[:, 0].clip(SMALLEST, 1)
    crops[:, 1:] = crops[:, 1:].clip(0, 1 - crops[:, :1])
    return list(map(tuple, crops.tolist()))


class Aligned(NamedTuple):
    """The crop of a photo, or its mirror image, that comes nearest to a picture in pixels; picture, photo: their places."""

    picture: int
    photo: int
    crop: Crop
    mirrored: bool


@dataclass
class CopyFinder:
    """The training photos in pixels and in features, and the ratio below which features tell a copy."""

    photos: Shards | np.ndarray  # uint8 (M, H, W, 3), as rendered
    pixels: list[torch.Tensor]
    network: Network
    features: list[torch.Tensor]
    groups: torch.Tensor  # (M,), near duplicates share a number
    feature_ratio: float

    @classmethod
    def of(cls, photos: Pixels, rendered: Pixels, device: torch.device) -> "CopyFinder":
        """rendered: the training photos as the VAE renders them; the photos themselves where the pictures were made without one.

        In features a photo counts by itself, its four corners and the mirror images of all; any other crop is searched for in pixels.
        """
        network, views_of = efficientnet_places(device), efficientnet_crops(device)
        pixels = pixel_views(rendered.values)
        hashes = [photo_hashes(Image.fromarray(photo)) for photo in photos.values]
        groups = torch.tensor(duplicate_groups(hashes, partial(really_alike, pixels)))
        views = [photo_features(views_of, rendered, mirrored).unflatten(1, (VIEWS, -1)).unbind(1) for mirrored in (False, True)]
        features = [*views[0], *views[1]]
        return cls(rendered.values, pixels, network, features, groups, calibrated_ratio(features, groups))

    def search(self, pictures: np.ndarray) -> tuple[Nearest, Nearest]:
        """The nearest photos of pictures, uint8 (N, H, W, 3): in pixels, and in features."""
        in_pixels, crops = self.aligned(pictures)
        return in_pixels, self.in_features(pictures, crops)

    def in_pixels(self, pictures: np.ndarray) -> Nearest:
        """The nearest photos, their mirror images and crops included: coarsely among all, then finely among the likeliest."""
        return self.aligned(pictures)[0]

    def aligned(self, pictures: np.ndarray) -> tuple[Nearest, list[Aligned]]:
        """`in_pixels`, and the crops of its nearest and second nearest photos that lie as the pictures do."""
        distance = distances(torch.from_numpy(resize(pictures, COARSE_PX).reshape(len(pictures), -1)), self.pixels)
        nearer, crops = torch.full_like(distance, math.inf), {}
        for index, picture in enumerate(resize(pictures, FINE_PX)):
            for photo in likeliest(distance[index], self.groups):
                nearer[index, photo], *crops[index, photo] = nearest_crop(picture, self.photos[photo])
        found = two_nearest(nearer, self.groups)
        pairs = {(index, photo) for photos in (found.photo, found.second) for index, photo in enumerate(photos.tolist())}
        return found, [Aligned(*pair, *crops[pair]) for pair in sorted(pairs & crops.keys())]

    def in_features(self, pictures: np.ndarray, crops: Sequence[Aligned] = ()) -> Nearest:
        """The nearest photos, their corners and mirror images included, to a network; of those in `crops`, these crops as well."""
        features = extract(self.network, pictures)
        distance = distances(features, self.features)
        if crops:
            views = (cropped(self.photos[crop.photo], crop.crop) for crop in crops)
            seen = extract(
                self.network, np.stack([view[:, ::-1] if crop.mirrored else view for view, crop in zip(views, crops, strict=True)])
            )
            for crop, view in zip(crops, seen, strict=True):
                nearer = (features[crop.picture].double() - view.double()).norm()
                distance[crop.picture, crop.photo] = torch.minimum(distance[crop.picture, crop.photo], nearer)
        return two_nearest(distance, self.groups)

    def shares(self, in_pixels: Nearest, in_features: Nearest) -> dict[str, float]:
        """The share of the pictures searched for that count as copies, by either measure."""
        return {"pixels": in_pixels.share_below(PIXEL_RATIO), "features": in_features.share_below(self.feature_ratio)}


def planted_copies(photos: np.ndarray) -> np.ndarray:
    """Photos mirrored and cropped, off the middle, a third each to 0.93, 0.81 and 0.68 of the side: what a search has to find."""
    crops = islice(cycle([(0.93, 0.05, 0.01), (0.81, 0.03, 0.13), (0.68, 0.2, 0.07)]), len(photos))
    copies = [cropped(photo, crop) for photo, crop in zip(photos, crops, strict=True)]
    return np.ascontiguousarray(np.stack(copies)[:, :, ::-1])
