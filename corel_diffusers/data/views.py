"""The versions of a photo that the UNet trains on: the photo, its mirror image and, optionally, augmented crops.

The outputs of a frozen network for all versions are computed once and cached as (N, 2 + 2V, …), with V augmented crops
per photo. The order of the versions is: photo, mirror image, then each augmented crop followed by its mirror image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from corel_diffusers.data.cache import SINGLE_PROCESS, ShardedArray, Share, cached_array
from corel_diffusers.data.transforms import Pixels, evenly_spaced, random_crops
from corel_diffusers.precision import arithmetic

CROP_CONDITIONS = 5  # number of crop parameters that describe an augmented crop
STATISTICS_PHOTOS = 10_000  # evenly spaced photos: more photos do not change the mean
# for a run that received a stop signal and has only seconds left; the statistics are measured again when the run ends
STATISTICS_PHOTOS_WHEN_STOPPED = 256


@dataclass
class AugmentedCrops:
    """V random crops with colour jitter of each of N photos. They are the same in every run.

    Crops are cut from `large`, the photos with more pixels. `places` and `jitter` are the arguments `crop_params` and
    `jitter` of `random_crops`.
    """

    large: Pixels
    places: torch.Tensor  # (N, V, 3)
    jitter: torch.Tensor  # (N, V, 2)

    @classmethod
    def of(cls, large: Pixels, count: int, height_px: int) -> "AugmentedCrops":
        """Draw `count` augmented crops of each photo, for training at a height of `height_px`."""
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(len(large), count, 3, generator=generator)
        # The scale is at least 0.5, half way to the smallest crop. Photos without more pixels than the training size
        # are not cropped.
        places[..., 0] = 0.5 + 0.5 * places[..., 0] if large.values.shape[1] > height_px else 1.0
        return cls(large, places, 0.2 * torch.rand(len(large), count, 2, generator=generator) - 0.1)

    def __len__(self) -> int:
        return self.places.shape[1]

    def batch(self, rows: slice, crop: int, pixels: Pixels) -> torch.Tensor:
        """Return one augmented crop of some photos: float32 (B, 3, H, W) in [-1, 1], with the size of `pixels`."""
        large, fitted = (torch.from_numpy(part.values[rows]) for part in (self.large, pixels))
        return random_crops(
            large, fitted, torch.ones(len(fitted), dtype=torch.bool), self.places[rows, crop], self.jitter[rows, crop]
        )

    def changes(self) -> np.ndarray:
        """Return the crop parameters that condition the UNet: (N, 2 + 2V, CROP_CONDITIONS).

        They are: the amount that is cut off (1 - scale); the vertical and the horizontal position of the crop, from -1
        to 1 times that amount; contrast; brightness. All are 0 for the photo and its mirror image.
        """
        cut = 1 - self.places[..., :1]
        crop_params = torch.cat([cut, cut * (2 * self.places[..., 1:] - 1), self.jitter], dim=-1)
        # a mirror image has the opposite horizontal position
        pairs = torch.stack([crop_params, crop_params * torch.tensor([1, 1, -1, 1, 1])], dim=2).flatten(1, 2)
        return torch.cat([torch.zeros(len(crop_params), 2, CROP_CONDITIONS), pairs], dim=1).numpy()


def pick_versions(step: int, seed: int, global_batch: int, views: int, view_chance: float) -> np.ndarray:
    """Return the index of the version to train on, for each photo of the global batch of a step: (B,).

    With probability `view_chance` it is one of the `views` augmented crops, otherwise the photo. Either of them is
    mirrored with probability 0.5. The choice depends only on the seed and the step, so only the chosen versions are
    read.
    """
    rng = np.random.default_rng([seed, step, 1])  # [seed, epoch] is the seed for the order of the photos
    mirror_draw, crop_draw = rng.random((2, global_batch))
    versions = (mirror_draw < 0.5).astype(int)
    if views:
        versions += 2 * (crop_draw < view_chance) * (1 + rng.integers(views, size=global_batch))
    return versions


@torch.no_grad()
def cache_versions(
    key: str,
    network: Callable[[torch.Tensor], torch.Tensor],
    pixels: Pixels,
    crops: AugmentedCrops | None,
    device: torch.device,
    batch_size: int,
    share: Share = SINGLE_PROCESS,
) -> ShardedArray:
    """Return the output of `network` for each version of each photo: cached, float32 (N, 2 + 2V, …).

    Args:
        key: identifies the network. The key of the cache also contains the arithmetic of the device.
        network: takes images (2 B, 3, H, W) in [-1, 1], in channels-last memory format, and returns (2 B, …).
    """

    def with_mirror(images: torch.Tensor) -> torch.Tensor:
        outputs = network(torch.cat([images, images.flip(-1)]).to(device, memory_format=torch.channels_last))
        return torch.stack(outputs.float().cpu().chunk(2), dim=1)

    def encode(photos: slice) -> np.ndarray:
        versions = [pixels.batch(photos)] + [crops.batch(photos, crop, pixels) for crop in range(num_crops)]
        return torch.cat([with_mirror(images) for images in versions], dim=1).numpy()

    num_crops = len(crops) if crops else 0
    shape = (len(pixels), 2 + 2 * num_crops, *with_mirror(pixels.batch(slice(1))).shape[2:])
    cache_key = f"{key}-{arithmetic(device)}-{pixels.key.removeprefix('pixels-')}-{len(pixels)}-{num_crops}"
    return cached_array(cache_key, shape, np.float32, encode, "encoding photos", share, batch_size)


def channel_statistics(
    versions: ShardedArray | np.ndarray,
    channels: slice = slice(None),
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    batch_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the variance of each channel of an array (N, V, C, h, w): (C,) each.

    At most STATISTICS_PHOTOS photos are used, `batch_size` at a time, so that a large cache does not have to fit in
    memory.

    Args:
        channels: the channels to use.
        transform: a function that is applied to the values first.
    """
    photos, parts = evenly_spaced(len(versions), STATISTICS_PHOTOS), []
    for start in range(0, len(photos), batch_size):
        part = transform(versions[photos[start : start + batch_size]][:, :, channels].astype(np.float64))
        parts.append((part.sum((0, 1, 3, 4)), (part**2).sum((0, 1, 3, 4)), part.size / part.shape[2]))
    total, square, count = (sum(values) for values in zip(*parts, strict=True))
    return total / count, square / count - (total / count) ** 2
