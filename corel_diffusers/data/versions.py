"""The versions of a photo that the UNet trains on: the photo, its mirror image and, optionally, augmented crops.

The outputs of a frozen network for all versions are computed once and cached as (N, 2 + 2V, …), with V augmented crops
per photo. The order of the versions is: photo, mirror image, then each augmented crop followed by its mirror image.
"""

from collections.abc import Callable

import numpy as np
import torch

from corel_diffusers.data.augmented_crops import AugmentedCrops
from corel_diffusers.data.cache import SINGLE_PROCESS, ShardedArray, Share, cached_array
from corel_diffusers.data.mixed_sizes import Array, MixedArray, join, parts_of
from corel_diffusers.data.pixels import Pixels, evenly_spaced
from corel_diffusers.runtime.precision import arithmetic

STATISTICS_PHOTOS = 10_000  # evenly spaced photos: more photos do not change the mean


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


def for_each_size(
    pixels: Pixels, crops: AugmentedCrops | None, compute: Callable[[Pixels, AugmentedCrops | None], Array]
) -> Array | MixedArray:
    """Return the results of `compute` for the photos of each image size, joined as one array of all photos."""
    parts = pixels.by_size()
    crops_by_size = crops.by_size() if crops else [None] * len(parts)
    return join(
        [(rows, compute(part, part_crops)) for (rows, part), part_crops in zip(parts, crops_by_size, strict=True)]
    )


def channel_statistics(
    versions: Array | MixedArray,
    channels: slice = slice(None),
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    batch_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the variance of each channel of an array (N, V, C, h, w): (C,) each.

    The photos may have several image sizes. At most STATISTICS_PHOTOS of them are used, `batch_size` at a time, so that
    a large cache does not have to fit in memory.

    Args:
        channels: the channels to use.
        transform: a function that is applied to the values first.
    """
    sums = []
    for array in parts_of(versions):
        photos = evenly_spaced(len(array), max(1, len(array) * STATISTICS_PHOTOS // len(versions)))
        for start in range(0, len(photos), batch_size):
            values = transform(array[photos[start : start + batch_size]][:, :, channels].astype(np.float64))
            sums.append((values.sum((0, 1, 3, 4)), (values**2).sum((0, 1, 3, 4)), values.size / values.shape[2]))
    total, square, count = (sum(values) for values in zip(*sums, strict=True))
    return total / count, square / count - (total / count) ** 2
