"""The flags of `corel-diffusers train` and `corel-diffusers env`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import tyro

from corel_diffusers.config.checks import (
    MIN_PHOTOS,
    SCENES,
    parse_size,
    require,
    require_cache,
    require_data_dir,
    require_usable,
    user_path,
)
from corel_diffusers.files import UserError, read_json, require_writable

VAE_FRACTION = 1 / 3  # of the minutes; the UNet has the rest (benchmarks/contest.py)
# The last minutes tune the decoder, in runs that are long enough (benchmarks/results/drawn_latents.md).
TUNING_MINUTES, MIN_MINUTES_WITH_TUNING = 2, 15


@dataclass(kw_only=True, frozen=True)
class Train:
    """Train a VAE and a UNet, evaluate the pipeline, and leave a grid of samples. The same command continues a run."""

    data_dir: str | None = None
    """Folder of photos, in any layout of docs/data.md. "scenes": this package draws the photos."""
    dataset_name: str | None = None
    """Id of a Hub dataset, user/name or user/name:config, instead of --data-dir."""
    minutes: float = 60
    """Minutes of training: a third for the VAE, two thirds for the UNet. From 15 minutes on, the last two tune the
    decoder for the samples. The evaluation comes on top: on a CPU, some minutes."""
    output_dir: str = "."
    """Folder for vae_models/ and diffusion_models/."""
    base_dir: str = "."
    """Folder at which relative paths start."""
    image_size: str | None = None
    """Image size in pixels: 128, or 96x144 (height x width). Default: planned."""
    aspect_buckets: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train on a few image sizes, so that photos of every shape keep their frame."""
    config: str | None = None
    """Model size: tiny, base or large (default: planned)."""
    seed: int = 42
    """Random seed."""
    num_images: int = 300
    """Number of samples that the evaluation draws."""

    def checked(self) -> Self:
        """Return the flags, or raise UserError for values that cannot be used."""
        require_usable(self)
        require(0 < self.minutes < math.inf, "minutes", self.minutes, "give a number above 0")
        if bool(self.data_dir) == bool(self.dataset_name):
            raise UserError("train needs photos: give --data-dir, a folder of photos, or --dataset-name")
        if self.data_dir and self.data_dir != SCENES:
            require_data_dir(user_path(self.base_dir, self.data_dir))
        if self.image_size:
            parse_size(self.image_size)
        require(self.config in (None, "tiny", "base", "large"), "config", self.config, "give tiny, base or large")
        require(
            self.num_images >= MIN_PHOTOS,
            "num_images",
            self.num_images,
            "give 4 or more, and some hundreds for good numbers",
        )
        require_writable(user_path(self.base_dir, self.output_dir), "--output-dir")
        require_cache()
        return self

    def folders(self) -> tuple[Path, Path]:
        """Return the folders of the VAE and of the pipeline, as absolute paths, which do not start at --base-dir."""
        output = user_path(self.base_dir, self.output_dir).absolute()
        return output / "vae_models", output / "diffusion_models"

    def can_be_evaluated(self) -> bool:
        """Return whether the run that train-unet has written holds out enough photos for an evaluation."""
        return read_json(self.folders()[1] / "run.json")["data"]["photos"]["validation"] >= MIN_PHOTOS

    def finished_vae_minutes(self) -> float | None:
        """Return the minutes of a VAE on whose latents a UNet trains already, or None.

        Its weights must not change any more, so more minutes than before go to the UNet.
        """
        vae, pipeline = (folder / "run.json" for folder in self.folders())
        if not (vae.is_file() and pipeline.is_file()):
            return None
        return read_json(vae).get("flags", {}).get("max_train_minutes")

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of the commands: train-vae, train-unet, tune-decoder and evaluate.

        There is no train-vae if a UNet trains on its latents already, and no tune-decoder in a short run.
        """
        vae, pipeline = map(str, self.folders())
        vae_minutes = self.finished_vae_minutes()
        source = ["--dataset-name", self.dataset_name] if self.dataset_name else ["--data-dir", self.data_dir]
        photos = [*source, "--base-dir", self.base_dir]
        shared = [*photos, "--seed", str(self.seed), "--resume", "latest"]
        shared += ["--config", self.config] if self.config else []
        shared += ["--aspect-buckets"] if self.aspect_buckets else []
        size = ["--image-size", self.image_size] if self.image_size else []
        tuning_minutes = TUNING_MINUTES if self.minutes >= MIN_MINUTES_WITH_TUNING else 0
        minutes = self.minutes - tuning_minutes
        unet_minutes = max((1 - VAE_FRACTION) * minutes, minutes - (vae_minutes or minutes))
        if not vae_minutes:
            yield ["train-vae", *shared, *size, "--output-dir", vae,
                   "--max-train-minutes", f"{VAE_FRACTION * minutes:g}"]  # fmt: skip
        yield ["train-unet", *shared, "--vae-checkpoint", vae, "--output-dir", pipeline,
               "--max-train-minutes", f"{unet_minutes:g}"]  # fmt: skip
        if tuning_minutes:
            yield ["tune-decoder", *photos, "--pipeline", pipeline, "--seed", str(self.seed),
                   "--minutes", f"{tuning_minutes:g}"]  # fmt: skip
        yield ["evaluate", *photos, "--pipeline", pipeline, "--num-images", str(self.num_images)]


@dataclass(kw_only=True, frozen=True)
class Env:
    """Print the versions and the devices that a bug report needs."""

    def checked(self) -> Self:
        """Return the flags: there is nothing to check."""
        return self
