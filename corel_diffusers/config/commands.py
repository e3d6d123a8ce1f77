"""The flags of the command `corel-diffusers`, one dataclass per subcommand."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro

from corel_diffusers.config.checks import (
    MIN_PHOTOS,
    SCENES,
    check_repo_id,
    model_location,
    parse_size,
    require,
    require_cache,
    require_data_dir,
    require_usable,
    user_path,
)
from corel_diffusers.files import UserError, require_writable


@dataclass(kw_only=True, frozen=True)
class Prepare:
    """Convert a folder of photos, in any layout of docs/data.md, to folders that are ready for training."""

    data_dir: str
    """Folder of raw photos. It is only read."""
    base_dir: str = "."
    """Folder at which relative paths start."""
    output_dir: str = "training_data"
    """The prepared folders are written to corel/ in this folder."""
    figs_dir: str = "figs"
    """Folder for the contact sheet."""
    visualize: bool = True
    """Draw the contact sheet."""
    trim_borders: bool = True
    """Cut off black film borders."""
    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stop at the first photo that cannot be used, instead of leaving it out."""
    test_fraction: float = 0.0
    """Fraction of each class for the split `test`. Training never reads it, and `evaluate` reports on it."""
    layout: Literal["auto", "corel", "corel-1k", "corel-5k", "folders", "names", "flat"] = "auto"
    """How the folder names the classes of its photos."""

    def checked(self) -> Self:
        """Return the flags, or raise UserError for values that cannot be used."""
        require_usable(self)
        require_data_dir(user_path(self.base_dir, self.data_dir))
        require(0 <= self.test_fraction <= 0.5, "test_fraction", self.test_fraction, "give a fraction from 0 to 0.5")
        require_writable(user_path(self.base_dir, self.output_dir), "--output-dir")
        if self.visualize:
            require_writable(user_path(self.base_dir, self.figs_dir), "--figs-dir")
        return self


def photo_source(args: "Evaluate | TuneDecoder") -> str | Path:
    """Return the folder of photos as a Path, "scenes", or the id of a Hub dataset."""
    return args.dataset_name or (SCENES if args.data_dir == SCENES else user_path(args.base_dir, args.data_dir))


@dataclass(kw_only=True, frozen=True)
class Sampling:
    """The flags for generating samples with a pipeline. `generate` and `evaluate` share them."""

    pipeline: Annotated[str, tyro.conf.arg(aliases=["--diffusion-checkpoint"])] = "diffusion_models"
    """Pipeline folder that train_unet.py wrote, or the Hub id of a pipeline."""
    trust_remote_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow the code of the pipeline to run: of a Hub repository, or of a folder that this toolkit did not write."""
    base_dir: str = "."
    """Folder at which relative paths start."""
    num_images: int = 16
    """Number of samples."""
    guidance_scale: float = 2.5
    """Guidance scale. 1 turns guidance off.
    Guidance leads away from the prediction of the guide model (the UNet early in its training).
    If there is no guide model, it leads away from the UNet's prediction without the class."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest noise level at which guidance acts, from 0 (clean) to 1 (pure noise).
    Default: 0 0.6 with a guide model, otherwise all levels."""
    sampler: Literal["auto", "ddpm", "ddim", "dpm-solver++", "unipc"] = "auto"
    """Sampler. auto means dpm-solver++.
    In measurements, its samples were as near to photos as those of DDIM, with half the steps."""
    steps: int | None = None
    """Number of denoising steps (default: 1000 for ddpm, 50 for ddim, 15 for the others)."""
    batch_size: int = 16
    """Number of samples per batch. It does not change the samples, except for the rounding of half precision."""
    seed: int | None = None
    """Random seed of the samples (default: a random one, which is printed)."""
    device: str = "auto"
    """Device: auto, cuda or cpu."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Mixed precision. auto means fp16 on CUDA, bf16 on a CPU with bf16 in hardware, and no otherwise."""

    @cached_property
    def pipeline_location(self) -> Path | str:
        """The folder of the pipeline as a Path, or its Hub id as a string."""
        return model_location(self.pipeline, self.base_dir, "--pipeline")

    def checked(self) -> Self:
        """Return the flags, or raise UserError for values that cannot be used."""
        require_usable(self)
        for name in ("num_images", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        require(self.steps is None or 1 <= self.steps <= 1000, "steps", self.steps, "give 1 to 1000")
        require_cache()
        low, high = self.guidance_interval or (0, 1)
        require(
            0 <= low <= high <= 1,
            "guidance_interval",
            f"{low:g} {high:g}",
            "give two numbers from 0 to 1, the lower first",
        )
        if isinstance(self.pipeline_location, str) and not self.trust_remote_code:
            raise UserError(
                f"--pipeline {self.pipeline} runs the code of that repository: "
                "read its pipeline.py, then give --trust-remote-code"
            )
        return self


@dataclass(kw_only=True, frozen=True)
class Generate(Sampling):
    """Generate samples with a trained pipeline, and save a grid and single images."""

    vae_checkpoint: str | None = None
    """Decode with this VAE instead of the pipeline's own VAE."""
    output: str = "generated_images.png"
    """File of the grid. Single images are saved in <output>_individual/."""
    class_: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Classes of the samples, by name or by their number in the folder of photos, as in --classes of train_unet.py.
    The samples cycle through them (default: all classes)."""
    size: str | None = None
    """Size of the samples in pixels, as 64x96 (height x width).
    Default: the size that most training photos had. A model that was trained with --aspect-buckets has several."""
    ddim_steps: int | None = None
    """Short form of --sampler ddim --steps N."""
    eta: float = 0.0
    """Amount of fresh noise in each step of DDIM, from 0 (none) to 1 (as much as DDPM)."""
    nrow: int = 4
    """Number of samples per row of the grid."""
    individual: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Save single images for any number of samples. Without this flag, they are saved for up to 16 samples."""

    @cached_property
    def vae_location(self) -> Path | str | None:
        """The folder of --vae-checkpoint as a Path, its Hub id as a string, or None for the pipeline's own VAE."""
        return self.vae_checkpoint and model_location(self.vae_checkpoint, self.base_dir, "--vae-checkpoint")

    def checked(self) -> Self:
        """Return the flags with --ddim-steps resolved, or raise UserError for values that cannot be used."""
        require(self.nrow >= 1, "nrow", self.nrow, "give 1 or more")
        require(
            self.ddim_steps is None or 1 <= self.ddim_steps <= 1000, "ddim_steps", self.ddim_steps, "give 1 to 1000"
        )
        if self.ddim_steps:
            if self.steps or self.sampler not in ("auto", "ddim"):
                raise UserError("--ddim-steps is short for --sampler ddim --steps: give only one of the two")
            return replace(self, sampler="ddim", steps=self.ddim_steps, ddim_steps=None).checked()
        _ = self.vae_location  # raises UserError if there is no such folder
        if self.size:
            parse_size(self.size, "--size")
        output = user_path(self.base_dir, self.output)
        if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(
                f"--output {self.output}: give a name ending in .png, .jpg or .webp for the grid; with --individual, "
                "the single images are saved in a folder beside it"
            )
        require(not output.is_dir(), "output", self.output, "this is a folder: give the name of a file")
        require_writable(output.parent, "--output")
        return super().checked()


@dataclass(kw_only=True, frozen=True)
class Evaluate(Sampling):
    """Measure how close samples are to held-out photos, and how many samples are copies of training photos."""

    data_dir: str | None = None
    """Folder of the photos that the model was trained on, with the held-out photos: prepared, raw, or "scenes"."""
    dataset_name: str | None = None
    """Id of a Hub dataset with these photos, user/name or user/name:config, instead of --data-dir."""
    classes: tuple[str, ...] = ()
    """Compare only with photos of these classes, given by name or number (default: the classes of the model)."""
    against: Literal["auto", "test", "validation", "all"] = "auto"
    """Photos to compare with. auto selects the test split if there is one, otherwise the validation split."""
    pictures: str | None = None
    """Evaluate the images in this folder, from any program, instead of samples from --pipeline."""
    features: Literal["efficientnet-lite0", "inception", "dinov2"] = "efficientnet-lite0"
    """Network whose features are compared.
    efficientnet-lite0 is installed with the package. The other networks are downloaded once.
    The quality of the VAE during training and --evaluate-every always use efficientnet-lite0."""
    output_dir: str | None = None
    """Folder for evaluation.json and evaluation.html.
    Default: the folder of the pipeline, or evaluation/ for --pictures and Hub ids."""
    num_images: int = 300
    batch_size: int = 50
    seed: int = 0
    """Random seed of the samples."""

    @property
    def photo_source(self) -> str | Path:
        """The folder of photos as a Path, "scenes", or the id of a Hub dataset."""
        return photo_source(self)

    @property
    def results_dir(self) -> Path:
        """The folder of evaluation.json and evaluation.html."""
        if self.output_dir:
            return user_path(self.base_dir, self.output_dir)
        is_folder = not self.pictures and isinstance(self.pipeline_location, Path)
        return self.pipeline_location if is_folder else user_path(self.base_dir, "evaluation")

    def checked(self) -> Self:
        """Return the flags, or raise UserError for values that cannot be used."""
        require_usable(self)
        if self.pictures:
            folder = user_path(self.base_dir, self.pictures)
            require(folder.is_dir(), "pictures", folder, "this is not a folder: check the path")
            way_out = "omit it: all images in the folder of --pictures are compared"
            require(self.num_images == type(self).num_images, "num_images", self.num_images, way_out)
        else:
            super().checked()
            way_out = "give 4 or more, and some hundreds for reliable numbers"
            require(self.num_images >= MIN_PHOTOS, "num_images", self.num_images, way_out)
        if bool(self.data_dir) == bool(self.dataset_name):
            raise UserError(
                "evaluate compares with the photos that the model was trained on: give --data-dir or --dataset-name"
            )
        if isinstance(self.photo_source, Path):
            require_data_dir(self.photo_source)
        require_writable(self.results_dir, "--output-dir")
        return self


@dataclass(kw_only=True, frozen=True)
class TuneDecoder:
    """Train the decoder of a pipeline on the latents that its UNet draws: its samples become sharper.

    The encoder and the UNet do not change. The pipeline in its folder is replaced at the end, in one piece.
    """

    pipeline: str = "diffusion_models"
    """Pipeline folder that train_unet.py wrote."""
    trust_remote_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow the code of the pipeline to run, of a folder that this toolkit did not write."""
    data_dir: str | None = None
    """Folder of the photos that the model was trained on: prepared, raw, or "scenes"."""
    dataset_name: str | None = None
    """Id of a Hub dataset with these photos, user/name or user/name:config, instead of --data-dir."""
    base_dir: str = "."
    """Folder at which relative paths start."""
    minutes: float = 2
    """Minutes of drawing and training. The UNet draws for a quarter of them, then the decoder is trained."""
    seed: int = 42
    """Random seed."""
    device: str = "auto"
    """Device: auto, cuda or cpu."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Mixed precision. auto means bf16 on a CPU with bf16 in hardware, and no otherwise."""

    @property
    def folder(self) -> Path:
        """The folder of the pipeline."""
        return user_path(self.base_dir, self.pipeline)

    @property
    def photo_source(self) -> str | Path:
        """The folder of photos as a Path, "scenes", or the id of a Hub dataset."""
        return photo_source(self)

    def checked(self) -> Self:
        """Return the flags, or raise UserError for values that cannot be used."""
        require_usable(self)
        require(self.minutes > 0, "minutes", self.minutes, "give a number above 0")
        if bool(self.data_dir) == bool(self.dataset_name):
            raise UserError(
                "tune-decoder needs the photos that the model was trained on: give --data-dir or --dataset-name"
            )
        if isinstance(self.photo_source, Path):
            require_data_dir(self.photo_source)
        if not self.folder.is_dir():
            raise UserError(f"--pipeline {self.folder} is not a folder: give the --output-dir of train_unet.py")
        require_writable(self.folder, "--pipeline")
        require_cache()
        return self


@dataclass(kw_only=True, frozen=True)
class Push:
    """Push a pipeline or a VAE with its model card to the Hugging Face Hub."""

    pipeline: str = "diffusion_models"
    """Pipeline folder that train_unet.py wrote."""
    vae: str | None = None
    """VAE folder that train_vae.py wrote, to push the VAE by itself instead of a pipeline."""
    repo_id: str
    """Id of the repository on the Hub: user/name."""
    base_dir: str = "."
    """Folder at which relative paths start."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Create a private repository. An existing public one is refused."""
    revision: str | None = None
    """Branch of the repository (default: main). It is created if it does not exist."""
    license: str | None = None
    """License in the model card, by its name on the Hub, such as cc-by-4.0."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only list the files that would be pushed."""

    @property
    def folder(self) -> Path:
        """The folder of the pipeline or the VAE."""
        return user_path(self.base_dir, self.vae or self.pipeline)

    def checked(self) -> Self:
        """Return the flags, or raise UserError for values that cannot be used."""
        require_usable(self)
        check_repo_id(self.repo_id, "--repo-id")
        if not self.folder.is_dir():
            flag, script = ("--vae", "train_vae.py") if self.vae else ("--pipeline", "train_unet.py")
            raise UserError(f"{flag} {self.folder} is not a folder: give the --output-dir of {script}")
        is_pipeline = (self.folder / "model_index.json").is_file()
        if self.vae and is_pipeline:
            raise UserError(f"--vae {self.folder} holds a pipeline: give it as --pipeline")
        if not self.vae and not is_pipeline and (self.folder / "config.json").is_file():
            raise UserError(f"--pipeline {self.folder} holds a single model: give a VAE as --vae")
        return self


@dataclass(kw_only=True, frozen=True)
class PushDataset:
    """Push photos with labels, captions and splits to the Hugging Face Hub. The repository is private."""

    data_dir: str
    """Folder of photos, prepared or not."""
    repo_id: str
    """Id of the repository on the Hub: user/name."""
    base_dir: str = "."
    """Folder at which relative paths start."""
    public: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Create a public repository: everybody can load the photos."""
    license: str | None = None
    """License in the card, by its name on the Hub, such as cc-by-4.0."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only list the files that would be pushed."""

    @property
    def folder(self) -> Path:
        """The folder of the photos."""
        return user_path(self.base_dir, self.data_dir)

    def checked(self) -> Self:
        """Return the flags, or raise UserError for values that cannot be used."""
        require_usable(self)
        check_repo_id(self.repo_id, "--repo-id")
        require_data_dir(self.folder)
        return self
