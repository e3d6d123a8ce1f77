"""`corel-diffusers generate`, and how fast the command answers."""

import sys

import numpy as np
import pytest
import torch
from conftest import launch, tool
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from corel_diffusers import generate as generating
from corel_diffusers.cli import Generate
from corel_diffusers.files import UserError


@pytest.fixture
def base(tmp_path, trained_unet):
    (tmp_path / "diffusion_models").symlink_to(trained_unet)
    return tmp_path


def pictures(folder) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def test_the_guides_command(base, trained_vae):
    flags = ["--output", "corel.png", "--base-dir", base, "--num-images", 4, "--batch-size", 4, "--seed", 7, "--nrow", 2, "--device", "cpu"]
    old_names = ["--diffusion-checkpoint", "diffusion_models/best_model.pt", "--vae-checkpoint", trained_vae / "best_model.pt"]
    done = tool("generate", *old_names, *flags)
    assert "dpm-solver++ with 15 steps on cpu, seed 7" in done.stdout
    assert Image.open(base / "corel.png").size == (2 * 34 + 2, 2 * 34 + 2)
    assert len(pictures(base / "corel_individual")) == 4


def test_pictures_are_the_pipelines_own_whatever_the_batch(base):
    common = ["generate", "--base-dir", base, "--num-images", 3, "--ddim-steps", 4, "--seed", 5, "--class", "pine forest", 1]
    common += ["--mixed-precision", "no"]
    tool(*common, "--batch-size", 2, "--output", "two.png")
    (base / "three_individual").mkdir()
    (base / "three_individual" / "mine.txt").write_text("a user's own file")
    tool(*common, "--batch-size", 3, "--output", "three.png")
    assert (base / "three_individual" / "mine.txt").is_file()
    pipe = DiffusionPipeline.from_pretrained(base / "diffusion_models", trust_remote_code=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(5 + place) for place in range(3)]
    expected = pipe(3, [2, 0, 2], num_inference_steps=4, generator=generators, output_type="np").images
    for name in ("two", "three"):
        for picture, reference in zip(pictures(base / f"{name}_individual"), expected, strict=True):
            assert np.abs(picture / 255 - reference).max() < 0.01
    assert Image.open(base / "two_individual" / "image_0001.png").text == {"seed": "6", "class": "sunset at sea"}


def test_more_than_sixteen_pictures_make_a_grid_only_unless_asked(base):
    common = ["generate", "--base-dir", base, "--num-images", 17, "--sampler", "unipc", "--steps", 2]
    tool(*common, "--output", "grid.png")
    assert not (base / "grid_individual").exists()
    tool(*common, "--output", "all.png", "--individual")
    assert len(pictures(base / "all_individual")) == 17


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-images", 0], "--num-images 0: give 1 or more"),
        (["--pipeline", "nowhere"], "--pipeline nowhere is no folder: train with train_unet.py first"),
        (["--pipeline", "somebody/model"], "read its pipeline.py, then give --trust-remote-code"),
        (["--ddim-steps", 5, "--sampler", "unipc"], "--ddim-steps is short for"),
        (["--output", "setup.cfg/picture.png"], "setup.cfg is a file, and no folder can be made there: give another place"),
        (["--output", "picture.doc"], "--output picture.doc: give a name ending in .png"),
    ],
)
def test_refused_flags_are_one_line(flags, expected, trained_unet):
    done = tool("generate", "--pipeline", trained_unet, *flags, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--class", "moon"], "the classes are 1 sunset at sea"),
        (["--device", "cuda"], "there is no GPU here"),
        (["--output", "a.webp", "--num-images", 1000, "--nrow", 1], "--output a.webp: the grid has a side of more than 16383 px"),
    ],
)
def test_what_the_model_or_the_machine_refuses_is_one_line(flags, expected, trained_unet, tmp_path):
    done = tool("generate", "--pipeline", trained_unet, "--base-dir", tmp_path, *flags, check=False)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_memory_has_no_room_for_is_refused_and_what_was_drawn_before_is_kept(trained_unet, tmp_path, monkeypatch):
    args = Generate(pipeline=trained_unet, num_images=4, batch_size=2, sampler="ddim", steps=1, mixed_precision="no", seed=0)
    pipe = DiffusionPipeline.from_pretrained(trained_unet, trust_remote_code=True)
    drawn, draw = [], type(pipe).__call__

    def small(pipe, *what, **options):
        drawn.append(what)
        if len(drawn) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(pipe, *what, **options)

    monkeypatch.setattr(type(pipe), "__call__", small)
    monkeypatch.setattr(generating, "load_pipeline", lambda *location: pipe)
    with pytest.raises(UserError, match="out of memory with --batch-size 2: give a smaller one"):
        generating.generate(args, tmp_path / "grid.png")
    assert len(pictures(tmp_path / "grid_individual")) == 2


def test_another_kind_of_pipeline_is_refused(trained_unet, tmp_path):
    parts = UNet2DModel.from_pretrained(trained_unet / "unet"), DDPMScheduler.from_pretrained(trained_unet / "scheduler")
    DDPMPipeline(*parts).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a DDPMPipeline: give one that train_unet.py wrote"):
        generating.load_pipeline(tmp_path, torch.device("cpu"))


def test_help_imports_nothing_heavy():
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
