"""The Python API: the commands as functions. Their keywords are the flags, with underscores.

A value that cannot be used raises `corel_diffusers.files.UserError`. Its text says what to do.
"""

import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TypeVar

from diffusers import DiffusionPipeline
from PIL import Image

from corel_diffusers.cli import COMMAND, run_evaluate, run_generate, run_prepare, run_push, run_train
from corel_diffusers.config.checks import user_path
from corel_diffusers.config.commands import Evaluate, Generate, Prepare, Push
from corel_diffusers.config.parsing import parse_command, words_of
from corel_diffusers.config.train import Train
from corel_diffusers.data.photos import load_photos
from corel_diffusers.files import UserError, read_json, read_metrics
from corel_diffusers.models.unet import build_unet
from corel_diffusers.models.vae import build_vae

__all__ = ["TrainedRun", "build_unet", "build_vae", "evaluate", "generate", "load_photos", "prepare", "push", "train"]

Flags = TypeVar("Flags", Train, Prepare, Generate, Evaluate, Push)


@dataclass(frozen=True)
class TrainedRun:
    """What `train` leaves: the folders of the VAE and of the pipeline."""

    vae_dir: Path
    pipeline_dir: Path

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The trained pipeline, loaded when it is first used. `run.pipeline("sunset").images[0]` draws an image."""
        return DiffusionPipeline.from_pretrained(self.pipeline_dir, trust_remote_code=True)

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl of the UNet: one dict per validation."""
        return read_metrics(self.pipeline_dir / "metrics.jsonl")

    @property
    def evaluation(self) -> dict:
        """The content of evaluation.json: how near the samples are to held-out photos, and how many are copies."""
        return read_json(self.pipeline_dir / "evaluation.json")

    @property
    def pictures(self) -> list[Path]:
        """The files of the curves and of the grid of samples."""
        files = [self.vae_dir / "training_losses.png", self.pipeline_dir / "loss_history.png"]
        return [file for file in [*files, self.pipeline_dir / "grid.png"] if file.is_file()]


def flags_of(kind: type[Flags], command: str, **values: object) -> Flags:
    """Return the checked flags of a command, from keywords. They are parsed as the words of a command line are.

    Raises:
        UserError: there is no such flag, or a value cannot be used.
    """
    return parse_command(kind, words_of(values, kind), f"corel-diffusers {command}")


def folder_of(pipeline: "str | Path | TrainedRun") -> str:
    """Return the folder or the Hub id of a pipeline. A TrainedRun stands for its pipeline.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(pipeline, TrainedRun):
        return str(pipeline.pipeline_dir)
    if not isinstance(pipeline, (str, PathLike)):
        raise TypeError(f"{type(pipeline).__name__}: give the folder of a pipeline, its Hub id, or what train returns")
    return str(pipeline)


def train(photos: str | Path, minutes: float = 60, *, output_dir: str | Path = ".", **flags: object) -> TrainedRun:
    """Train a VAE and a UNet, and evaluate the pipeline. The same call continues an interrupted run.

    Training runs in processes of its own, so it works from a thread and several times in one notebook. In a notebook,
    the curves and the grid of samples are shown at the end.

    Args:
        photos: a folder of photos, "scenes" for photos that this package draws, or the id of a Hub dataset
            (user/name, or user/name:config).
        minutes: minutes of training: a third for the VAE, two thirds for the UNet. From 15 minutes on, the last two
            tune the decoder for the samples.
        output_dir: the folder for vae_models/ and diffusion_models/.
        flags: more flags of `corel-diffusers train`, such as image_size="96x144" or aspect_buckets=True.

    Returns:
        The folders of the models. `run.pipeline` is the pipeline, `run.metrics` and `run.evaluation` are the numbers.

    Raises:
        TypeError: `photos` is neither a path nor an id.
        UserError: a flag cannot be used.
        RuntimeError: training failed. Its output says why.

    Example:
        >>> import corel_diffusers as cd
        >>> run = cd.train("photos", minutes=60, image_size=32, num_images=6)
        >>> run.pipeline("sunset at sea").images[0].size
        (32, 32)
    """
    if not isinstance(photos, (str, PathLike)):
        raise TypeError(
            f"{type(photos).__name__}: give a folder of photos or the id of a Hub dataset. A dataset of the library "
            "datasets becomes a folder with its save_to_disk"
        )
    if minutes is None:
        raise UserError("minutes None: give a number above 0")
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.:-]+", str(photos)) and not Path(photos).exists()
    source = {"dataset_name" if is_hub_id else "data_dir": photos}
    args = flags_of(Train, "train", **source, minutes=minutes, output_dir=output_dir, **flags)
    run_train(args, run_and_print)
    run = TrainedRun(*args.folders())
    show_in_notebook(run.pictures)
    return run


def run_and_print(words: list[str]) -> None:
    """Run a command in a process of its own, and print its output here: a notebook shows only what Python prints.

    Raises:
        RuntimeError: the command failed.
    """
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    last_lines = deque(maxlen=5)
    try:
        for line in process.stdout:
            last_lines.append(line)
            print(line, end="")
    except KeyboardInterrupt:  # the button of a notebook: the command saves a checkpoint and ends
        process.terminate()
        print(process.stdout.read(), end="")
        process.wait()
        raise
    if process.wait():
        raise RuntimeError(f"corel-diffusers {words[0]} ended with {process.returncode}: {''.join(last_lines)}")


def show_in_notebook(files: list[Path]) -> None:
    """Show image files, if this process is a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and "IPKernelApp" in shell.config:
        from IPython.display import Image as Shown
        from IPython.display import display

        display(*(Shown(str(file)) for file in files))


def prepare(data_dir: str | Path, **flags: object) -> Path:
    """Convert a folder of photos to folders that are ready for training.

    Args:
        data_dir: a folder of photos, in any layout of docs/data.md. It is only read.
        flags: more flags of `corel-diffusers prepare`, such as output_dir or test_fraction=0.15.

    Returns:
        The folder corel_all/ with all photos, for `train` and for --data-dir.

    Raises:
        UserError: the photos cannot be prepared.
    """
    args = flags_of(Prepare, "prepare", data_dir=data_dir, **flags)
    run_prepare(args)
    return user_path(args.base_dir, args.output_dir) / "corel" / "corel_all"


def generate(pipeline: str | Path | TrainedRun, num_images: int = 16, **flags: object) -> list[Image.Image]:
    """Generate samples with a trained pipeline, and save a grid and single images.

    Args:
        pipeline: what `train` returns, a folder of train_unet.py, or a Hub id together with trust_remote_code=True.
        num_images: the number of samples.
        flags: more flags of `corel-diffusers generate`, such as class_="sunset", seed=1 or output="grid.png".

    Returns:
        The samples, RGB images, or grey ones from a model of grey photos.

    Raises:
        UserError: a flag cannot be used.
    """
    return run_generate(flags_of(Generate, "generate", pipeline=folder_of(pipeline), num_images=num_images, **flags))


def evaluate(pipeline: str | Path | TrainedRun, data_dir: str | Path, **flags: object) -> dict:
    """Measure how near samples are to held-out photos, and how many of them are copies of training photos.

    Args:
        pipeline: what `train` returns, a folder of train_unet.py, or a Hub id together with trust_remote_code=True.
        data_dir: the photos that the model was trained on, with the held-out photos, or "scenes".
        flags: more flags of `corel-diffusers evaluate`, such as num_images=300 or features="dinov2".

    Returns:
        The content of evaluation.json: `results["generation"]["kid_e3"]` is KID x1000.

    Raises:
        UserError: a flag cannot be used.
    """
    return run_evaluate(flags_of(Evaluate, "evaluate", pipeline=folder_of(pipeline), data_dir=data_dir, **flags))


def push(pipeline: str | Path | TrainedRun, repo_id: str, **flags: object) -> str | None:
    """Push a pipeline, or a VAE by itself, with its model card to the Hugging Face Hub.

    Args:
        pipeline: what `train` returns, the folder that train_unet.py wrote, or the one that train_vae.py wrote.
        repo_id: user/name.
        flags: more flags of `corel-diffusers push`: private, revision, license, dry_run.

    Returns:
        The address of the commit on the Hub, or None with dry_run=True.

    Raises:
        UserError: there is no model or no token, or the Hub refuses the upload.
    """
    folder = folder_of(pipeline)
    is_vae = (Path(folder) / "config.json").is_file() and not (Path(folder) / "model_index.json").is_file()
    model = {"vae" if is_vae else "pipeline": folder}
    return run_push(flags_of(Push, "push", **model, repo_id=repo_id, **flags))
