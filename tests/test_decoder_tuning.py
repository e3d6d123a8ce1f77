"""tune-decoder: the decoder learns from latents that the UNet draws, and nothing else of the pipeline changes."""

import json
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import tool_here
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from corel_diffusers.cli import COMMAND
from corel_diffusers.data.latents import scale_latents, unscale_latents
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.decoder_tuning import class_names_of, current_pipeline, denoise_from, draw_latents
from corel_diffusers.models.vae import encode_photos
from corel_diffusers.saved_models import decoder_tuning

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline_folder(trained_unet, tmp_path):
    """A copy of the trained pipeline, which a test may change."""
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def test_only_the_decoder_changes(pipeline_folder, trained_unet, raw_photos):
    done = tool_here("tune-decoder", "--pipeline", pipeline_folder, "--data-dir", raw_photos, "--minutes", 0.1)
    assert "has a decoder that was tuned for" in done.stdout
    before, after = (load_file(folder / "vae" / WEIGHTS) for folder in (trained_unet, pipeline_folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    assert all(value.isfinite().all() for value in after.values())
    assert (trained_unet / "unet" / WEIGHTS).read_bytes() == (pipeline_folder / "unet" / WEIGHTS).read_bytes()
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (trained_unet, pipeline_folder)]
    assert len({json.dumps(config | {"_name_or_path": None}, sort_keys=True) for config in configs}) == 1
    assert "The decoder of `vae/` was tuned" in (pipeline_folder / "README.md").read_text()
    assert not (pipeline_folder / ".running.json").exists()
    # a plain AutoencoderKL in a pipeline that everybody can load
    assert type(AutoencoderKL.from_pretrained(pipeline_folder, subfolder="vae")) is AutoencoderKL
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder, trust_remote_code=True)
    assert len(pipe(2, num_inference_steps=2).images) == 2
    tuning = decoder_tuning(pipeline_folder)
    assert tuning["steps"] > 0
    assert tuning["photos"] == json.loads((trained_unet / "run.json").read_text())["data"]["photos"]["train"]
    # another VAE is not the tuned one
    shutil.copy(trained_unet / "vae" / WEIGHTS, pipeline_folder / "vae" / WEIGHTS)
    assert decoder_tuning(pipeline_folder) is None


def test_a_stopped_command_leaves_the_pipeline_as_it_was(pipeline_folder, trained_unet, raw_photos):
    words = ["tune-decoder", "--pipeline", pipeline_folder, "--data-dir", raw_photos, "--minutes", 0.5]
    process = subprocess.Popen([*COMMAND, *map(str, words)], stderr=subprocess.PIPE)
    seen = b""
    while b"tuning the decoder" not in seen:  # the bar
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in rest
    for part in ("vae", "unet"):
        assert (trained_unet / part / WEIGHTS).read_bytes() == (pipeline_folder / part / WEIGHTS).read_bytes()
    assert decoder_tuning(pipeline_folder) is None


def test_denoising_from_a_low_level_gives_the_latents_back(pipeline_folder, raw_photos):
    """The reference are the latents of the photos. The noise of the level hides more of them than the result does."""
    pipe = current_pipeline(DiffusionPipeline.from_pretrained(pipeline_folder, trust_remote_code=True))
    photos, pixels = cache_pixels(load_photos(raw_photos), pipe.default_size)
    names = class_names_of(photos)
    with torch.no_grad():
        clean = scale_latents(encode_photos(pipe.vae, pixels["train"].batch(slice(8))).mean, pipe.vae)
        torch.testing.assert_close(scale_latents(unscale_latents(clean, pipe.vae), pipe.vae), clean)
        torch.manual_seed(0)
        errors = [(denoise_from(pipe, clean, names[:8], level) - clean).square().mean() for level in (0.1, 0.3, 0.9)]
        drawn = draw_latents(pipe, pixels["train"], names, ends=0)
    assert errors[0] < errors[1] < errors[2]
    assert drawn.denoised.shape == drawn.free.shape == (len(drawn.photos), *clean.shape[1:])
    assert drawn.photos.max() < len(pixels["train"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", 0], "--minutes 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--pipeline", "missing", "--minutes", 1], "give the --output-dir of train_unet.py"),
        (["--dataset-name", "user/name"], "give --data-dir or --dataset-name"),
        (["--mixed-precision", "fp16"], "--mixed-precision"),
    ],
)
def test_flags_that_cannot_be_used_end_in_one_line(flags, message, trained_unet, raw_photos):
    shared = [] if "--pipeline" in flags else ["--pipeline", trained_unet]
    done = tool_here("tune-decoder", *shared, "--data-dir", raw_photos, *flags, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
