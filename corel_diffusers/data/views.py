"""The versions of a photo that the UNet trains on: the photo, its mirror image, and where wanted changed views of it.

What a frozen network makes of them is computed once and cached, in one order: (N, 2 + 2V, …), photo and mirror image first, then
each view and its mirror image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from corel_diffusers.data.cache import ALONE, Shards, Share, cached_array
from corel_diffusers.data.transforms import Pixels, evenly, random_views
from corel_diffusers.precision import arithmetic

CHANGES = 5  # numbers that say how a view differs from its photo
STATISTICS_OF = 10_000  # photos, evenly over all: more do not change a mean
STOPPED_STATISTICS_OF = 256  # in a run that was told to stop, which has seconds left; it is measured again when the run ends


@dataclass
class Views:
    """Crops of the photos at more pixels, brightness and contrast varied; the same in every run."""

    large: Pixels
    places: torch.Tensor  # (N, V, 3) as random_views has them
    jitter: torch.Tensor  # (N, V, 2)

    @classmethod
    def of(cls, large: Pixels, count: int, height_px: int) -> "Views":
        """So many views of each photo, for training at that height."""
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(len(large), count, 3, generator=generator)
        # no closer than half way to the closest crop; photos that have no more pixels come whole
        places[..., 0] = 0.5 + 0.5 * places[..., 0] if large.values.shape[1] > height_px else 1.0
        return cls(large, places, 0.2 * torch.rand(len(large), count, 2, generator=generator) - 0.1)

    def __len__(self) -> int:
        return self.places.shape[1]

    def batch(self, rows: slice, view: int, pixels: Pixels) -> torch.Tensor:
        """One view of some photos, float32 (B, 3, H, W) in [-1, 1], of the size of `pixels`."""
        large, fitted = (torch.from_numpy(part.values[rows]) for part in (self.large, pixels))
        return random_views(large, fitted, torch.ones(len(fitted), dtype=torch.bool), self.places[rows, view], self.jitter[rows, view])

    def changes(self) -> np.ndarray:
        """What the UNet is told of each version, (N, 2 + 2V, CHANGES): zero for the photo and its mirror image.

        How much is cut off; where the crop lies, down and across, from -1 to 1 times that; contrast; brightness.
        """
        cut = 1 - self.places[..., :1]
        told = torch.cat([cut, cut * (2 * self.places[..., 1:] - 1), self.jitter], dim=-1)
        pairs = torch.stack([told, told * torch.tensor([1, 1, -1, 1, 1])], dim=2).flatten(1, 2)  # a mirror image lies across
        return torch.cat([torch.zeros(len(told), 2, CHANGES), pairs], dim=1).numpy()


def pick_versions(step: int, seed: int, global_batch: int, views: int, view_chance: float) -> np.ndarray:
    """The version of each photo of a step's global batch, (B,): a view with that chance, else the photo; of it, the mirror image half
    of the time. Known from the step alone, so that no version is read that is not trained on."""
    random = np.random.default_rng([seed, step, 1])  # [seed, epoch] gives the order of the photos
    mirrored, changed = random.random((2, global_batch))
    versions = (mirrored < 0.5).astype(int)
    if views:
        versions += 2 * (changed < view_chance) * (1 + random.integers(views, size=global_batch))
    return versions


@torch.no_grad()
def cache_versions(
    key: str,
    network: Callable[[torch.Tensor], torch.Tensor],
    pixels: Pixels,
    views: Views | None,
    device: torch.device,
    batch_size: int,
    share: Share = ALONE,
) -> Shards:
    """What `network` makes of each version of each photo: cached, float32 (N, 2 + 2V, …).

    key: stands for the network; the arithmetic of the device is added to it. network: (2 B, 3, H, W) in [-1, 1], channels last -> (2 B, …).
    """

    def both(pictures: torch.Tensor) -> torch.Tensor:
        made = network(torch.cat([pictures, pictures.flip(-1)]).to(device, memory_format=torch.channels_last))
        return torch.stack(made.float().cpu().chunk(2), dim=1)

    def make(photos: slice) -> np.ndarray:
        versions = [pixels.batch(photos)] + [views.batch(photos, view, pixels) for view in range(count)]
        return torch.cat([both(pictures) for pictures in versions], dim=1).numpy()

    count = len(views) if views else 0
    shape = (len(pixels), 2 + 2 * count, *both(pixels.batch(slice(1))).shape[2:])
    name = f"{key}-{arithmetic(device)}-{pixels.key.removeprefix('pixels-')}-{len(pixels)}-{count}"
    return cached_array(name, shape, np.float32, make, "encoding photos", share, batch_size)


def channel_statistics(
    versions: Shards | np.ndarray,
    channels: slice = slice(None),
    of: Callable[[np.ndarray], np.ndarray] = np.asarray,
    at_once: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of those channels of (N, V, C, h, w), or of a function of them, (C,) each; of at most STATISTICS_OF photos.

    In parts, so that a large cache stays on the disk.
    """
    photos, parts = evenly(len(versions), STATISTICS_OF), []
    for start in range(0, len(photos), at_once):
        part = of(versions[photos[start : start + at_once]][:, :, channels].astype(np.float64))
        parts.append((part.sum((0, 1, 3, 4)), (part**2).sum((0, 1, 3, 4)), part.size / part.shape[2]))
    total, square, count = (sum(values) for values in zip(*parts, strict=True))
    return total / count, square / count - (total / count) ** 2
