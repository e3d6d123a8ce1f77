"""`corel-diffusers generate`: samples, refused flags, and a fast --help."""

import sys

import numpy as np
import pytest
import torch
from conftest import launch, tool, tool_here
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from corel_diffusers.config.commands import Generate
from corel_diffusers.files import UserError
from corel_diffusers.sampling import generate as generating


@pytest.fixture
def base(tmp_path, trained_unet):
    (tmp_path / "diffusion_models").symlink_to(trained_unet)
    return tmp_path


def read_images(folder) -> list[np.ndarray]:
    """Read the PNG files of a folder: uint8 (H, W, 3) each."""
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def test_flags_of_the_older_scripts_work(base, trained_vae):
    flags = [
        "--output",
        "corel.png",
        "--base-dir",
        base,
        "--num-images",
        4,
        "--batch-size",
        4,
        "--seed",
        7,
        "--nrow",
        2,
        "--device",
        "cpu",
    ]
    old_flags = [
        "--diffusion-checkpoint",
        "diffusion_models/best_model.pt",
        "--vae-checkpoint",
        trained_vae / "best_model.pt",
    ]
    completed = tool("generate", *old_flags, *flags)
    assert "dpm-solver++ with 15 steps on cpu, seed 7" in completed.stdout
    assert Image.open(base / "corel.png").size == (2 * 34 + 2, 2 * 34 + 2)
    assert len(read_images(base / "corel_individual")) == 4


def test_samples_equal_those_of_the_pipeline_at_any_batch_size(base):
    common = [
        "generate",
        "--base-dir",
        base,
        "--num-images",
        3,
        "--ddim-steps",
        4,
        "--seed",
        5,
        "--class",
        "pine forest",
        1,
    ]
    common += ["--mixed-precision", "no"]
    tool_here(*common, "--batch-size", 2, "--output", "two.png")
    (base / "three_individual").mkdir()
    (base / "three_individual" / "mine.txt").write_text("a user's own file")
    tool_here(*common, "--batch-size", 3, "--output", "three.png")
    assert (base / "three_individual" / "mine.txt").is_file()
    pipe = DiffusionPipeline.from_pretrained(base / "diffusion_models", trust_remote_code=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(5 + index) for index in range(3)]
    expected = pipe(3, [2, 0, 2], num_inference_steps=4, generator=generators, output_type="np").images
    for name in ("two", "three"):
        for image, reference in zip(read_images(base / f"{name}_individual"), expected, strict=True):
            assert np.abs(image / 255 - reference).max() < 0.01
    assert Image.open(base / "two_individual" / "image_0001.png").text == {"seed": "6", "class": "sunset at sea"}


def test_the_pipeline_by_itself_draws_what_generate_draws(base):
    """With nothing but a class: the folder comes with the sampler of `generate`, and takes its number of steps."""
    tool_here("generate", "--base-dir", base, "--num-images", 1, "--seed", 5, "--class", "pine forest",
              "--mixed-precision", "no", "--output", "alone.png")  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(base / "diffusion_models", trust_remote_code=True)
    expected = pipe("pine forest", generator=torch.Generator().manual_seed(5), output_type="np").images[0]
    assert np.abs(read_images(base / "alone_individual")[0] / 255 - expected).max() < 0.01


def test_more_than_sixteen_samples_are_saved_as_a_grid_only_by_default(base):
    common = ["generate", "--base-dir", base, "--num-images", 17, "--sampler", "unipc", "--steps", 2]
    shown = tool_here(*common, "--output", "grid.png").stdout
    assert "single images: none, because there are more than 16: give --individual" in shown
    assert not (base / "grid_individual").exists()
    tool_here(*common, "--output", "all.png", "--individual")
    assert len(read_images(base / "all_individual")) == 17


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-images", 0], "--num-images 0: give 1 or more"),
        (["--pipeline", "nowhere"], "--pipeline nowhere is not a folder: train with train_unet.py first"),
        (["--pipeline", "somebody/model"], "read its pipeline.py, then give --trust-remote-code"),
        (["--ddim-steps", 5, "--sampler", "unipc"], "--ddim-steps is short for"),
        (
            ["--output", "setup.cfg/grid.png"],
            "setup.cfg is a file, so no folder can be created there: give another path",
        ),
        (["--output", "grid.doc"], "--output grid.doc: give a name ending in .png"),
    ],
)
def test_invalid_flags_give_one_line(flags, expected, trained_unet):
    completed = tool_here("generate", "--pipeline", trained_unet, *flags, check=False)
    assert completed.returncode == 2
    assert expected in completed.stderr
    assert completed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--class", "moon"], "the classes are 1 sunset at sea"),
        (["--device", "cuda"], "there is no GPU here"),
        (
            ["--output", "a.webp", "--num-images", 1000, "--nrow", 1],
            "--output a.webp: the grid has a side of more than 16383 px",
        ),
    ],
)
def test_flags_that_do_not_fit_the_model_or_machine_give_one_line(flags, expected, trained_unet, tmp_path):
    completed = tool_here("generate", "--pipeline", trained_unet, "--base-dir", tmp_path, *flags, check=False)
    assert completed.returncode == 2
    assert expected in completed.stderr.splitlines()[-1]
    assert "Traceback" not in completed.stderr
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line_and_keeps_the_finished_samples(trained_unet, tmp_path, monkeypatch):
    args = Generate(
        pipeline=trained_unet, num_images=4, batch_size=2, sampler="ddim", steps=1, mixed_precision="no", seed=0
    )
    pipe = DiffusionPipeline.from_pretrained(trained_unet, trust_remote_code=True)
    calls, original_call = [], type(pipe).__call__

    def fail_in_second_batch(pipe, *args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original_call(pipe, *args, **options)

    monkeypatch.setattr(type(pipe), "__call__", fail_in_second_batch)
    monkeypatch.setattr(generating, "load_pipeline", lambda *location: pipe)
    with pytest.raises(UserError, match="out of memory with --batch-size 2: give a smaller one"):
        generating.generate(args, tmp_path / "grid.png")
    assert len(read_images(tmp_path / "grid_individual")) == 2


def test_another_kind_of_pipeline_is_refused(trained_unet, tmp_path):
    components = (
        UNet2DModel.from_pretrained(trained_unet / "unet"),
        DDPMScheduler(),
    )
    DDPMPipeline(*components).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a DDPMPipeline: give one that train_unet.py wrote"):
        generating.load_pipeline(tmp_path, torch.device("cpu"))


def test_help_imports_no_heavy_modules():
    code = """
import sys
from corel_diffusers.cli import main
sys.argv = ["corel-diffusers", "--help"]
try:
    main()
except SystemExit:
    print(sorted({"torch", "diffusers", "datasets", "numpy"} & set(sys.modules)))
"""
    assert launch(sys.executable, "-c", code).stdout.splitlines()[-1] == "[]"
