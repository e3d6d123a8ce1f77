"""Grey photos: one channel in the VAE, three equal channels in the pixels, grey images from the pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photos, run_here
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

import corel_diffusers as cd
from corel_diffusers.data.decoding import is_grey
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import are_grey, cache_pixels
from corel_diffusers.losses.vae import adaptive_weight
from corel_diffusers.models.vae import VAEWithPosterior, build_vae, decode_latents, encode_photos


@pytest.fixture(scope="module")
def grey_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw Corel folder of grey photos. Half of them are saved as RGB, as many programs do."""
    folder = make_photos(tmp_path_factory.mktemp("grey") / "photos")
    for index, file in enumerate(sorted(folder.glob("*.png"))):
        photo = Image.open(file).convert("L")
        (photo if index % 2 else photo.convert("RGB")).save(file)
    return folder


def test_all_photos_must_be_grey(grey_photos, raw_photos):
    assert are_grey(load_photos(grey_photos))
    photos = load_photos(raw_photos)
    assert not are_grey(photos)
    mixed = load_photos(grey_photos)
    mixed["validation"] = photos["validation"]
    assert not are_grey(mixed)


def test_a_tinted_photo_is_not_grey():
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90), dtype=np.uint8)).convert("RGB")
    assert is_grey(grey)
    sepia = np.clip(np.asarray(grey) * np.array([1.0, 0.95, 0.85]), 0, 255).astype(np.uint8)
    assert not is_grey(Image.fromarray(sepia))


def test_grey_pixels_have_three_equal_channels_and_their_own_cache(raw_photos):
    photos = load_photos(raw_photos)
    coloured, grey = (cache_pixels(photos, (32, 32), grey=flag)[1]["train"] for flag in (False, True))
    assert coloured.key != grey.key
    values = grey.values[:]
    assert (values == values[..., :1]).all()
    first = photos["train"][0]["image"].convert("L")
    assert abs(values[0, ..., 0].mean() - np.asarray(first).mean()) < 2


def test_a_grey_vae_gets_one_channel_and_gives_three_equal_ones():
    torch.manual_seed(0)
    vae = build_vae("tiny", (32, 32), grey=True)
    assert vae.config.in_channels == vae.config.out_channels == 1
    photos = torch.rand(2, 1, 32, 32).expand(-1, 3, -1, -1)
    posterior = encode_photos(vae, photos)
    assert torch.equal(posterior.mean, vae.encode(photos[:, :1]).latent_dist.mean)
    images = decode_latents(vae, posterior.mean)
    assert torch.equal(images, vae.decode(posterior.mean).sample.repeat(1, 3, 1, 1))


def test_the_adaptive_weight_of_a_grey_vae_equals_autograd():
    """The reconstruction has three channels, but the last layer has one output."""
    torch.manual_seed(0)
    model = VAEWithPosterior(build_vae("tiny", (32, 32), grey=True), adversarial=True)
    photos = torch.rand(2, 1, 32, 32).expand(-1, 3, -1, -1)
    reconstruction, _, _, last_layer_input = model(photos, torch.zeros(2, 4, 8, 8))
    last_layer = model.vae.decoder.conv_out
    losses = (reconstruction - photos).abs().mean(), (reconstruction[:, 1] ** 3).mean()
    grads = [torch.autograd.grad(loss, reconstruction, retain_graph=True)[0] for loss in losses]
    norms = [torch.autograd.grad(loss, last_layer.weight, retain_graph=True)[0].norm() for loss in losses]
    weight = adaptive_weight(*grads, last_layer, last_layer_input)
    assert float(weight) == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-4)


def test_grey_photos_train_one_channel_and_give_grey_images(grey_photos, configs, tmp_path, capsys):
    shared = ["--data-dir", grey_photos, "--batch-size", 4, "--epochs", 1, "--mixed-precision", "no"]
    run_here("train_vae", [*shared, "--config", configs / "vae.json", "--image-size", 32, "--adversarial-weight", 0.3,
                           "--adversarial-start", 0.3, "--sample-every", 1,
                           "--output-dir", tmp_path / "vae"])  # fmt: skip
    assert "notice: all photos are grey, so the VAE has one channel" in capsys.readouterr().out
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.in_channels == 1
    run_here("train_unet", [*shared, "--config", configs / "unet.json", "--vae-checkpoint", tmp_path / "vae",
                            "--views", 1, "--output-dir", tmp_path / "unet"])  # fmt: skip
    assert "converted to grey" not in capsys.readouterr().out
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "unet", trust_remote_code=True)
    assert pipe(num_inference_steps=2).images[0].mode == "L"
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 1)
    evaluation = {"num_images": 4, "steps": 2, "against": "all", "output_dir": str(tmp_path)}
    colours = cd.evaluate(tmp_path / "unet", grey_photos, **evaluation)["colours"]
    assert colours["pictures"]["red"] == colours["pictures"]["blue"]
    assert colours["photos"]["red"] == colours["photos"]["blue"]


def test_a_grey_vae_and_photos_with_colours_give_a_notice(grey_photos, raw_photos, configs, tmp_path, capsys):
    shared = ["--batch-size", 4, "--max-train-steps", 1, "--mixed-precision", "no", "--sample-every", 9]
    run_here("train_vae", [*shared, "--data-dir", grey_photos, "--config", configs / "vae.json", "--image-size", 32,
                           "--output-dir", tmp_path / "vae"])  # fmt: skip
    run_here("train_unet", [*shared, "--data-dir", raw_photos, "--config", configs / "unet.json", "--views", 0,
                            "--vae-checkpoint", tmp_path / "vae", "--output-dir", tmp_path / "unet"])  # fmt: skip
    assert "notice: the VAE has one channel, so the photos are converted to grey" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_channels(grey_photos, configs, tmp_path):
    """Runs of earlier versions had three channels, also for grey photos. A run of grey photos stays grey."""
    flags = ["--data-dir", grey_photos, "--config", configs / "vae.json", "--image-size", 32, "--batch-size", 4,
             "--checkpoint-every", 1, "--mixed-precision", "no", "--no-perceptual"]  # fmt: skip
    run_here("train_vae", [*flags, "--no-grey", "--epochs", 1, "--output-dir", tmp_path / "old"])
    run = json.loads((tmp_path / "old" / "run.json").read_text())
    run.pop("channels")
    (tmp_path / "old" / "run.json").write_text(json.dumps(run))
    run_here("train_vae", [*flags, "--epochs", 2, "--resume", "latest", "--output-dir", tmp_path / "old"])
    assert AutoencoderKL.from_pretrained(tmp_path / "old").config.in_channels == 3
    run_here("train_vae", [*flags, "--epochs", 1, "--output-dir", tmp_path / "grey"])
    coloured = make_photos(tmp_path / "photos")
    for file in coloured.glob("*.png"):  # the same names: only the colours are new
        assert (grey_photos / file.name).is_file()
    flags[1] = coloured
    run_here("train_vae", [*flags, "--epochs", 2, "--resume", "latest", "--output-dir", tmp_path / "grey"])
    assert AutoencoderKL.from_pretrained(tmp_path / "grey").config.in_channels == 1


@pytest.mark.parametrize(("flag", "photos", "channels"), [("--no-grey", "grey_photos", 3), ("--grey", "raw_photos", 1)])
def test_the_flag_decides(flag, photos, channels, configs, tmp_path, request, capsys):
    flags = ["--data-dir", request.getfixturevalue(photos), "--config", configs / "vae.json", "--image-size", 32,
             "--max-train-steps", 1, "--no-perceptual", flag, "--output-dir", tmp_path]  # fmt: skip
    run_here("train_vae", flags)
    assert AutoencoderKL.from_pretrained(tmp_path).config.in_channels == channels
    assert "all photos are grey" not in capsys.readouterr().out
    assert flag in json.loads((tmp_path / "run.json").read_text())["command"]
