"""Configs -> models: presets, own JSON, sizes."""

import json

import pytest
import torch
from conftest import UNET_CONFIG
from diffusers.models.attention_processor import Attention

from corel_diffusers.files import UserError
from corel_diffusers.models import (
    INITIAL_LOGVAR,
    UNetInTraining,
    VAEWithPosterior,
    build_discriminator,
    build_unet,
    build_vae,
    downsample_factor,
    inner_grid,
    load_config,
)


@pytest.mark.parametrize(("preset", "latent_shape"), [("tiny", (4, 16, 24)), ("base", (4, 16, 24))])
def test_presets_run_forward_at_rectangular_sizes(preset, latent_shape):
    vae = build_vae(preset, (64, 96))
    with torch.no_grad():
        reconstruction, mean, logvar, drawn_from = VAEWithPosterior(vae)(torch.zeros(1, 3, 64, 96), torch.zeros(1, *latent_shape))
        assert drawn_from.shape == (1, 0, 64, 96)
        unet = build_unet(preset, (64, 96), vae, num_classes=6)
        prediction = unet(mean, torch.tensor([5]), torch.tensor([6])).sample
    assert reconstruction.shape == (1, 3, 64, 96)
    assert mean.shape == logvar.shape == prediction.shape == (1, *latent_shape)
    assert vae.config.scaling_factor == 1
    assert unet.config.sample_size == list(latent_shape[1:])


def test_a_fresh_vae_lets_the_photo_through_its_noise_and_mixes_no_channels():
    torch.manual_seed(0)
    vae, photos = build_vae("tiny", (64, 64)), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        posterior = vae.encode(photos).latent_dist
        channels = vae.encoder(photos)
        assert torch.equal(posterior.mean, channels[:, : posterior.mean.shape[1]])
        assert torch.equal(vae.decode(posterior.mean).sample, vae.decoder(posterior.mean))
    assert posterior.logvar.mean() == pytest.approx(INITIAL_LOGVAR, abs=0.5)


def test_an_adversarial_vae_in_training_tells_what_its_last_layer_was_given():
    vae = build_vae("tiny", (32, 32))
    model = VAEWithPosterior(vae, adversarial=True)
    reconstruction, _, _, drawn_from = model(torch.rand(2, 3, 32, 32), torch.zeros(2, 4, 8, 8))
    assert torch.equal(vae.decoder.conv_out(drawn_from), reconstruction)
    assert not drawn_from.requires_grad
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 8, 8))
    assert model.drawn_from is None, "nothing stays behind"


def test_a_unet_in_training_is_without_changes_the_plain_one():
    torch.manual_seed(0)
    unet = build_unet("tiny", (32, 32), build_vae("tiny", (32, 32)), num_classes=2)
    model = UNetInTraining(unet, changes=5, features=7)
    torch.nn.init.normal_(model.told.weight)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        plain = unet(*inputs).sample
        assert torch.equal(model(*inputs, torch.zeros(2, 5))[0], plain)
        assert not torch.allclose(model(*inputs, torch.ones(2, 5))[0], plain, atol=1e-3)
        assert torch.equal(unet(*inputs).sample, plain), "nothing stays behind"
    _, guess = model(*inputs, torch.ones(2, 5))
    assert guess.shape == (2, 7, *inner_grid(unet, (8, 8))) == (2, 7, 4, 4)
    guess.mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0, "the guess trains the UNet"
    assert unet.conv_out.weight.grad is None
    assert model.told.weight.grad.abs().sum() > 0
    bare = UNetInTraining(unet, changes=0, features=0)
    assert len(list(bare.parameters())) == len(list(unet.parameters()))
    assert bare(*inputs, torch.zeros(2, 0))[1].shape[1] == 0
    without_classes = UNetInTraining(build_unet("tiny", (32, 32), build_vae("tiny", (32, 32)), num_classes=None), changes=0, features=0)
    prediction, _ = without_classes(*inputs, torch.zeros(2, 0))
    assert torch.equal(prediction, without_classes.unet(*inputs[:2]).sample), "labels are not looked at"


def test_a_compiled_unet_in_training_is_the_uncompiled_one():
    torch.manual_seed(0)
    model = UNetInTraining(build_unet("tiny", (32, 32), build_vae("tiny", (32, 32)), num_classes=2), changes=5, features=7)
    torch.nn.init.normal_(model.told.weight)
    names = list(model.state_dict())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 2])
    plain = [model(*inputs, changes) for changes in torch.ones(3, 2, 5).cumsum(0)]
    graphs = []
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for changes, expected in zip(torch.ones(3, 2, 5).cumsum(0), plain, strict=True):
        for value, wanted in zip(model(*inputs, changes), expected, strict=True):
            assert torch.allclose(value, wanted, atol=1e-6)
    assert len(graphs) == 1, "one graph, compiled once"
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vae = build_vae("tiny", (32, 32))
        model = vae if kind == "vae" else build_unet("tiny", (32, 32), vae, num_classes=2)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        inputs = (torch.rand(2, 3, 32, 32),) if kind == "vae" else (torch.rand(2, 4, 8, 8), torch.tensor([3, 9]), torch.tensor([0, 2]))
        model(*inputs).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("config", ["tiny", "base", "unet.json"])
def test_all_attention_is_normed(config, tmp_path):
    """UNet2DModel leaves one out where the time is a scale and shift; the tiny UNet's activations then grew until the loss was nan."""
    (tmp_path / "unet.json").write_text(json.dumps(UNET_CONFIG | {"resnet_time_scale_shift": "scale_shift"}))
    config = str(tmp_path / config) if config.endswith("json") else config
    unet = build_unet(config, (64, 64), build_vae("tiny", (64, 64)), 2)
    assert all(module.group_norm is not None for module in unet.modules() if isinstance(module, Attention))


def test_the_large_presets_build():
    with torch.device("meta"):  # shapes without memory
        vae = build_vae("large", (128, 128))
        unet = build_unet("large", (128, 128), vae, num_classes=6)
    assert unet.config.sample_size == 16
    assert [round(sum(p.numel() for p in model.parameters()) / 1e6) for model in (vae, unet)] == [4, 144]


@pytest.mark.parametrize(("factor", "channels"), [(4, [16, 32, 64]), (8, [16, 32, 64, 64]), (16, [16, 32, 64, 64, 64])])
def test_downsample_is_the_factor_of_the_latents(factor, channels):
    vae = build_vae("tiny", (64, 64), latent_dim=6, downsample=factor)
    assert list(vae.config.block_out_channels) == channels
    assert downsample_factor(vae) == factor
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 6, 64 // factor, 64 // factor)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do():
    with pytest.raises(UserError, match=r"--image-size 100x150: the VAE can take multiples of 8 px: give 96x144 or 104x152"):
        build_vae("large", (100, 150))
    with pytest.raises(UserError, match=r"--image-size 5: .* give 8$"):
        build_vae("large", (5, 5))
    with pytest.raises(UserError, match=r"--image-size 72: the VAE and the UNet can take multiples of 32 px: give 64 or 96"):
        build_unet("base", (72, 72), build_vae("large", (72, 72)), None)


def test_an_own_config_is_taken_and_its_faults_are_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(UNET_CONFIG | {"_class_name": "UNet2DModel"}))
    unet = build_unet(str(path), (32, 32), build_vae("tiny", (32, 32)), None)
    assert unet.config.dropout == UNET_CONFIG["dropout"]
    assert build_unet(str(path), (32, 32), build_vae("tiny", (32, 32)), None, dropout=0.3).config.dropout == 0.3
    assert unet.config.block_out_channels == [16, 32]
    assert unet.config.num_class_embeds is None
    path.write_text(json.dumps(UNET_CONFIG | {"norm_num_groups": 7}))
    with pytest.raises(UserError, match=r"--config .*mine.json makes no UNet2DModel"):
        build_unet(str(path), (32, 32), build_vae("tiny", (32, 32)), None)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="expected one JSON object"):
        build_vae(str(path), (32, 32))


def test_group_norm_of_the_presets_keeps_brightness():
    """A group of one channel, or two, forgets how bright the photo is: the tiny VAE lost 0.8 dB by it, that of base 3 dB."""
    for preset in ("tiny", "base", "large"):
        values = load_config("vae", preset)
        assert min(values["block_out_channels"]) >= 8 * values["norm_num_groups"]
        values = load_config("unet", preset)
        assert min(values["block_out_channels"]) >= 2 * values["norm_num_groups"]


def test_the_discriminator_sees_as_much_as_it_says():
    """The photo's values that one verdict depends on: a square of 26 px, the positions that its gradient reaches."""
    discriminator = build_discriminator()
    for layer in discriminator:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.ones_(layer.weight)
    convolutions = torch.nn.Sequential(*(layer for layer in discriminator if isinstance(layer, torch.nn.Conv2d)))  # norms see everything
    photo = torch.zeros(1, 3, 64, 64, requires_grad=True)
    convolutions(photo)[0, 0, 8, 8].backward()
    rows = photo.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 26
    assert "26 x 26 px" in build_discriminator.__doc__
