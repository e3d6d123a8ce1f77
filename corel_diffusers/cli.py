"""The command `corel-diffusers`: its flags, checked before anything heavy is imported, and the call that each leads to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from corel_diffusers.arguments import SCENES, check_repo_id, model_location, require
from corel_diffusers.files import UserError, one_line_errors, require_writable


@dataclass(kw_only=True)
class Prepare:
    """Raw photos (Corel, Corel-1K, one folder a class, flat) -> folders ready to train on."""

    data_dir: str
    """Folder of raw photos; it is only read."""
    base_dir: str = "."
    """Relative paths start here."""
    output_dir: str = "training_data"
    """The prepared folders go into corel/ below this."""
    figs_dir: str = "figs"
    """The contact sheet goes here."""
    visualize: bool = True
    """Draw the contact sheet."""
    trim_borders: bool = True
    """Cut off black film borders."""
    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stop at photos that cannot be used, in place of leaving them out."""
    test_fraction: float = 0.0
    """Share of each class to set aside as the split `test`, which training never reads and `evaluate` reports on."""
    layout: Literal["auto", "corel", "corel-1k", "folders", "flat"] = "auto"
    """How the folder names its classes."""

    def run(self) -> None:
        base = Path(self.base_dir)
        if not (base / self.data_dir).is_dir():
            raise UserError(f"--data-dir {base / self.data_dir} is no folder: check the path (relative ones start at --base-dir)")
        require(0 <= self.test_fraction <= 0.5, "test_fraction", self.test_fraction, "give a share from 0 to 0.5")
        figs_dir = base / self.figs_dir if self.visualize else None
        require_writable(base / self.output_dir, "--output-dir")
        if figs_dir:
            require_writable(figs_dir, "--figs-dir")
        from corel_diffusers.data.prepare import prepare

        prepare(base / self.data_dir, base / self.output_dir, figs_dir, self.layout, self.trim_borders, self.strict, self.test_fraction)


@dataclass(kw_only=True)
class Sampling:
    """What drawing pictures from a pipeline takes."""

    pipeline: Annotated[str, tyro.conf.arg(aliases=["--diffusion-checkpoint"])] = "diffusion_models"
    """Pipeline folder that train_unet.py wrote, or a Hub id."""
    trust_remote_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the pipeline.py of a Hub repository."""
    base_dir: str = "."
    """Relative paths start here."""
    num_images: int = 16
    """How many pictures."""
    guidance_scale: float = 2.5
    """How far to lead away from what the UNet would draw early in its training, or without the class; 1 is not at all."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels, 0 clean to 1 pure noise, within which guidance acts (default: 0 0.6 with a guide, else all of them)."""
    sampler: Literal["auto", "ddpm", "ddim", "dpm-solver++", "unipc"] = "auto"
    """Sampler. auto: DPM-Solver++, which was measured to come as near to photos in half the steps of DDIM."""
    steps: int | None = None
    """Denoising steps (default: ddpm 1000, ddim 50, the others 15)."""
    batch_size: int = 16
    """Pictures at a time; does not change them, but for the rounding of half precision."""
    seed: int | None = None
    """Fixes the pictures (default: drawn, and printed)."""
    device: str = "auto"
    """auto, cuda or cpu."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto is fp16 on CUDA, bf16 where the CPU has it in hardware, else no."""

    def check(self) -> None:
        """Refuses values that nothing can be drawn with; the pipeline becomes a Path or a Hub id."""
        for name in ("num_images", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        require(self.steps is None or 1 <= self.steps <= 1000, "steps", self.steps, "give 1 to 1000")
        low, high = self.guidance_interval or (0, 1)
        require(0 <= low <= high <= 1, "guidance_interval", f"{low:g} {high:g}", "give two numbers from 0 to 1, the lower first")
        self.pipeline = model_location(self.pipeline, Path(self.base_dir), "--pipeline")
        if isinstance(self.pipeline, str) and not self.trust_remote_code:
            raise UserError(
                f"--pipeline {self.pipeline} runs the code of that repository: read its pipeline.py, then give --trust-remote-code"
            )


@dataclass(kw_only=True)
class Generate(Sampling):
    """Pictures from a trained pipeline: a grid, and each by itself."""

    vae_checkpoint: str | None = None
    """Decode with this VAE in place of the pipeline's own."""
    output: str = "generated_images.png"
    """The grid; single pictures go to <output>_individual/."""
    class_: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Classes by name or by their number in the photos' folder, as --classes of the scripts has them (default: all in turn)."""
    ddim_steps: int | None = None
    """Short for --sampler ddim --steps N."""
    eta: float = 0.0
    """DDIM's share of fresh noise."""
    nrow: int = 4
    """Pictures in a row of the grid."""
    individual: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write each picture by itself, however many; up to 16 are in any case."""

    def run(self) -> None:
        require(self.nrow >= 1, "nrow", self.nrow, "give 1 or more")
        require(self.ddim_steps is None or 1 <= self.ddim_steps <= 1000, "ddim_steps", self.ddim_steps, "give 1 to 1000")
        if self.ddim_steps:
            if self.steps or self.sampler not in ("auto", "ddim"):
                raise UserError("--ddim-steps is short for --sampler ddim --steps: give one or the other")
            self.sampler, self.steps = "ddim", self.ddim_steps
        self.check()
        base = Path(self.base_dir)
        if self.vae_checkpoint:
            self.vae_checkpoint = model_location(self.vae_checkpoint, base, "--vae-checkpoint")
        if (base / self.output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"--output {self.output}: give a name ending in .png, .jpg or .webp")
        require_writable((base / self.output).parent, "--output")
        from corel_diffusers.generate import generate

        generate(self, base / self.output)


@dataclass(kw_only=True)
class Evaluate(Sampling):
    """How good the pictures are beside held-out photos, and how many are copies of training photos."""

    data_dir: str | None = None
    """The photos that the model was trained on, held-out ones included: prepared, raw, or "scenes"."""
    dataset_name: str | None = None
    """The same as a Hub dataset id, in place of --data-dir."""
    classes: tuple[str, ...] = ()
    """Compare with these classes only, by name or number (default: those that the model has)."""
    against: Literal["auto", "test", "validation", "all"] = "auto"
    """Photos to compare with. auto: those set aside as test, or else the validation photos."""
    pictures: str | None = None
    """Judge the pictures of this folder, whatever made them, in place of drawing from --pipeline."""
    features: Literal["efficientnet-lite0", "inception", "dinov2"] = "efficientnet-lite0"
    """Network that sees the pictures. The first comes with the package, the others are fetched once."""
    output_dir: str | None = None
    """evaluation.json and evaluation.html go here (default: the pipeline's folder; evaluation/ for pictures and Hub ids)."""
    num_images: int = 300
    batch_size: int = 50
    seed: int = 0
    """Fixes the pictures."""

    def run(self) -> None:
        base = Path(self.base_dir)
        if self.pictures:
            require((base / self.pictures).is_dir(), "pictures", base / self.pictures, "this is no folder: check the path")
        else:
            self.check()
            require(self.num_images >= 4, "num_images", self.num_images, "give 4 or more, some hundred to trust the numbers")
        if bool(self.data_dir) == bool(self.dataset_name):
            raise UserError("evaluate compares with the photos that the model was trained on: give --data-dir or --dataset-name")
        source = self.dataset_name or (SCENES if self.data_dir == SCENES else base / self.data_dir)
        if isinstance(source, Path) and not source.is_dir():
            raise UserError(f"--data-dir {source} is no folder: check the path (relative ones start at --base-dir)")
        own = self.pipeline if isinstance(self.pipeline, Path) else base / "evaluation"
        output_dir = base / self.output_dir if self.output_dir else own
        require_writable(output_dir, "--output-dir")
        from corel_diffusers.evaluation.evaluate import evaluate

        evaluate(self, source, output_dir)


@dataclass(kw_only=True)
class Push:
    """A pipeline folder with its model card -> the Hugging Face Hub."""

    pipeline: str = "diffusion_models"
    """Pipeline folder that train_unet.py wrote."""
    repo_id: str
    """user/name on the Hub."""
    base_dir: str = "."
    """Relative paths start here."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make the repository private."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only list what would be pushed."""

    def run(self) -> None:
        check_repo_id(self.repo_id, "--repo-id")
        folder = Path(self.base_dir) / self.pipeline
        if not folder.is_dir():
            raise UserError(f"--pipeline {folder} is no folder: give the --output-dir of train_unet.py")
        from corel_diffusers.hub import push

        push(folder, self.repo_id, self.private, self.dry_run)


def main() -> None:
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"prepare": Prepare, "generate": Generate, "evaluate": Evaluate, "push": Push}, prog="corel-diffusers"
        ).run()
