"""Crops of photos: compare them with images in pixels, and find near duplicates among the photos."""

from collections.abc import Iterable
from itertools import product

import numpy as np
import torch
from PIL import Image

Crop = tuple[float, float, float]  # scale, left and top, as fractions of the side
# The coarse search compares these crops of every photo: the full photo, and nine crops at each of two scales. They are
# so small that ten thousand photos take 0.3 GB.
COARSE_PX = 16
CROPS: list[Crop] = [(1.0, 0.0, 0.0)] + [
    (scale, left * (1 - scale), top * (1 - scale))
    for scale in (0.85, 0.7)
    for left, top in product((0, 0.5, 1), repeat=2)
]
# Root mean square difference at COARSE_PX, of 255. It is at most 6 for re-saved photos, at most 12 for slightly cropped
# ones, and more for different photos.
DUPLICATE_LEVELS = 12.0
DUPLICATE_FRACTION = 0.15  # the same as a fraction of the contrast, for duplicates that are brighter or paler
# The fine search compares an image with single photos at FINE_PX. It refines the three best crops in smaller and
# smaller steps.
FINE_PX, STEPS, MIN_SCALE = 32, (0.06, 0.06, 0.03, 0.015), 0.6


def pixel_crops(photos: Iterable[np.ndarray]) -> list[torch.Tensor]:
    """Return uint8 (N, D) at COARSE_PX for each crop in CROPS and for its mirror image.

    photos: uint8 (N, H, W, 3).
    """

    def flat_crops(photo: np.ndarray) -> np.ndarray:
        crops = np.stack([crop_image(photo, crop, (COARSE_PX, COARSE_PX)) for crop in CROPS])
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


def resize(images: Iterable[np.ndarray], side_px: int, crop: Crop = CROPS[0]) -> np.ndarray:
    """Resize a crop of each image to a square, without keeping the aspect ratio: uint8 (N, side_px, side_px, 3)."""
    return np.stack([crop_image(image, crop, (side_px, side_px)) for image in images])


def crop_image(image: np.ndarray, crop: Crop, size_px: tuple[int, int] | None = None) -> np.ndarray:
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
            best_crops = [crops[index] for index in distance.min(1).argsort()[:3]]
            crops = list(dict.fromkeys(crop for best in best_crops for crop in neighbouring_crops(best, step)))
    best, mirrored = np.unravel_index(distance.argmin(), distance.shape)
    return float(distance.min()), crops[best], bool(mirrored)


def neighbouring_crops(crop: Crop, step: float) -> list[Crop]:
    """Return 27 crops within the photo: scale, left and top are each one step less, the same, or one step more."""
    crops = np.array(crop) + step * np.array(list(product((-1, 0, 1), repeat=3)))
    crops[:, 0] = crops[:, 0].clip(MIN_SCALE, 1)
    crops[:, 1:] = crops[:, 1:].clip(0, 1 - crops[:, :1])
    return list(map(tuple, crops.tolist()))
