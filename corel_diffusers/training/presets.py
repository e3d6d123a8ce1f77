"""The presets of model size, what each needs, and what runs with it have reached."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Preset(NamedTuple):
    """A model size.

    min_images_seen: images that training has to see before this size is worth its cost.
    min_photos: with fewer photos, a model of this size memorises them.
    reached: pairs (images seen, quality measured on 221 Corel photos at this size).
    """

    config: str
    side_px: int
    batch_size: int
    min_images_seen: int = 0
    min_photos: int = 0
    reached: tuple[tuple[int, float], ...] = ()


class PresetSeries(NamedTuple):
    """The presets of one script.

    minutes: the length of a run for which no length is given.
    measure: the format of the values in `Preset.reached`.
    recipe: more flags for the smallest preset: (steps, size (height, width)) -> flags.
    """

    presets: tuple[Preset, ...]
    minutes: float
    measure: str
    recipe: Callable[[float, tuple[int, int]], dict] | None = None


def vae_recipe(steps: float, size_px: tuple[int, int]) -> dict:
    """Return the loss weights for a long VAE run. In a run of fewer steps, they cost more than they gain."""
    if steps < ADVERSARIAL_FROM:
        return {}
    return {"perceptual_weight": 1.0, "kl_weight": 0.2 / math.prod(size_px), "adversarial_weight": 0.3}


# `reached` of `tiny` is from benchmarks/contest.py and from shorter and longer runs. `reached` of `base` is from
# benchmarks/results/choices.md, "The presets for GPUs".
VAE_PRESETS = PresetSeries(
    # A base VAE is good after fewer images (benchmarks/results/choices.md). But the UNet that is trained on it then has
    # four times the work, because of the image size.
    (
        Preset("tiny", 64, 2, reached=((3_800, 23.6), (27_000, 25.0))),
        Preset("base", 128, 16, 40_000, reached=((9_100, 25.7),)),
        Preset("large", 256, 16, 200_000, 5_000),
    ),
    20,
    "held-out PSNR {:.1f} dB",
    vae_recipe,
)
UNET_PRESETS = PresetSeries(
    (
        Preset("tiny", 64, 16, reached=((64_000, 50), (148_000, 45))),
        Preset("base", 128, 16, 100_000),
        Preset("large", 256, 32, 1_000_000, 5_000),
    ),
    40,
    "KID x1000 {:.0f} against held-out photos (real photos have about 0)",
)
# steps from which a run uses the discriminator, and the speed with it as a fraction of the speed without it;
# benchmarks/results/choices.md, "Two hours"
ADVERSARIAL_FROM, SPEED_WITH_DISCRIMINATOR = 15_000, 0.75
