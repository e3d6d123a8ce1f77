"""Random crops with colour jitter: new ones in each step of the VAE, and fixed versions of each photo for the UNet."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.mixed_sizes import parts_of
from corel_diffusers.data.pixels import Pixels, to_float
from corel_diffusers.runtime.devices import to_device
from corel_diffusers.runtime.randomness import StepRandom

CROP_CONDITIONS = 5  # number of crop parameters that describe an augmented crop


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
    def of(cls, large: Pixels, count: int, fitted: Pixels) -> "AugmentedCrops":
        """Draw `count` augmented crops of each photo. `fitted`: the photos at the training size."""
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(len(large), count, 3, generator=generator)
        # The scale is at least 0.5, half way to the smallest crop. Photos without more pixels than the training size
        # are not cropped.
        is_larger = parts_of(large.values)[0].shape[1] > parts_of(fitted.values)[0].shape[1]
        places[..., 0] = 0.5 + 0.5 * places[..., 0] if is_larger else 1.0
        return cls(large, places, 0.2 * torch.rand(len(large), count, 2, generator=generator) - 0.1)

    def __len__(self) -> int:
        return self.places.shape[1]

    def by_size(self) -> list["AugmentedCrops"]:
        """Return the crops of the photos of each image size, in the order of `Pixels.by_size`."""
        return [AugmentedCrops(part, self.places[photos], self.jitter[photos]) for photos, part in self.large.by_size()]

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


def augmented_photos(
    args: VAEArguments, batch: list[torch.Tensor], rng: StepRandom, device: torch.device
) -> torch.Tensor:
    """Return random crops with colour jitter, half of them mirrored: float32 (B, 3, H, W) in [-1, 1].

    Args:
        batch: the photos at the training size and at the larger size, uint8 (B, H, W, 3) each.
    """
    fitted, large = (to_device(values, device) for values in batch)
    jitter = to_device(args.colour_jitter * (2 * rng.uniform(2) - 1), device)
    images = random_crops(large, fitted, rng.chance(args.crop_chance), rng.uniform(3), jitter)
    is_mirrored = to_device(rng.chance(0.5), device).view(-1, 1, 1, 1)
    return torch.where(is_mirrored, images.flip(-1), images)


def random_crops(
    large: torch.Tensor, fitted: torch.Tensor, is_crop: torch.Tensor, crop_params: torch.Tensor, jitter: torch.Tensor
) -> torch.Tensor:
    """Return augmented photos, float32 (B, 3, H, W) in [-1, 1]: full photos or random crops, with colour jitter.

    Keep `is_crop` and `crop_params` on the CPU. They are read one element at a time, and each read from a GPU would
    make the CPU wait for the GPU.

    Args:
        large: uint8 (B, H2, W2, 3), the photos with more pixels. Crops are cut from them.
        fitted: uint8 (B, H, W, 3), the same photos at the training size.
        is_crop: bool (B,). True replaces the photo with a crop.
        crop_params: (B, 3) in [0, 1): the scale, top and left of each crop. Scale 0 is the smallest crop, H x W pixels
            of `large`. Scale 1 is the full photo. The scale between them is logarithmic. Top and left are fractions of
            the space outside the crop.
        jitter: (B, 2), the colour jitter: it is added to the contrast, which is 1, and to the brightness.
    """
    photos = to_float(fitted)
    height, width = photos.shape[-2:]
    for row in is_crop.nonzero().flatten().tolist():
        scale, top_fraction, left_fraction = crop_params[row].tolist()
        sides = [
            round(small * (big / small) ** scale) for small, big in ((height, large.shape[1]), (width, large.shape[2]))
        ]
        top, left = (
            int(fraction * (full - side + 1))
            for fraction, full, side in zip((top_fraction, left_fraction), large.shape[1:3], sides, strict=True)
        )
        crop = to_float(large[row : row + 1, top : top + sides[0], left : left + sides[1]])
        photos[row] = F.interpolate(crop, (height, width), mode="bicubic", antialias=True)[0]
    contrast, brightness = jitter.view(-1, 2, 1, 1, 1).unbind(1)
    return (photos * (1 + contrast) + brightness).clamp(-1, 1)
