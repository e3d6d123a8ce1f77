"""Models are built from presets and from JSON files of the user, and sizes that do not fit are refused."""

import json

import pytest
import torch
from conftest import UNET_CONFIG
from diffusers.models.attention_processor import Attention

from corel_diffusers.files import UserError
from corel_diffusers.models.configs import downsample_factor, load_config
from corel_diffusers.models.discriminator import build_discriminator
from corel_diffusers.models.unet import UNetForTraining, build_unet, inner_stride
from corel_diffusers.models.vae import INITIAL_LOGVAR, VAEWithPosterior, build_vae


@pytest.mark.parametrize(("preset", "latent_shape"), [("tiny", (4, 16, 24)), ("base", (4, 16, 24))])
def test_presets_accept_rectangular_sizes(preset, latent_shape):
    vae = build_vae(preset, (64, 96))
    with torch.no_grad():
        reconstruction, mean, logvar, last_layer_input = VAEWithPosterior(vae)(
            torch.zeros(1, 3, 64, 96), torch.zeros(1, *latent_shape)
        )
        assert last_layer_input.shape == (1, 0, 64, 96)
        unet = build_unet(preset, (64, 96), vae, num_classes=6)
        model_pred = unet(mean, torch.tensor([5]), torch.tensor([6])).sample
    assert reconstruction.shape == (1, 3, 64, 96)
    assert mean.shape == logvar.shape == model_pred.shape == (1, *latent_shape)
    assert vae.config.scaling_factor == 1
    assert unet.config.sample_size == list(latent_shape[1:])


def test_a_new_vae_has_little_posterior_noise_and_does_not_mix_latent_channels():
    torch.manual_seed(0)
    vae, photos = build_vae("tiny", (64, 64)), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        posterior = vae.encode(photos).latent_dist
        encoder_output = vae.encoder(photos)
        assert torch.equal(posterior.mean, encoder_output[:, : posterior.mean.shape[1]])
        assert torch.equal(vae.decode(posterior.mean).sample, vae.decoder(posterior.mean))
    assert posterior.logvar.mean() == pytest.approx(INITIAL_LOGVAR, abs=0.5)


def test_an_adversarial_vae_returns_the_input_of_its_last_layer():
    vae = build_vae("tiny", (32, 32))
    model = VAEWithPosterior(vae, adversarial=True)
    reconstruction, _, _, last_layer_input = model(torch.rand(2, 3, 32, 32), torch.zeros(2, 4, 8, 8))
    assert torch.equal(vae.decoder.conv_out(last_layer_input), reconstruction)
    assert not last_layer_input.requires_grad
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 8, 8))
    assert model.drawn_from is None, "nothing is kept after a forward pass"


def test_a_unet_for_training_without_crop_parameters_equals_the_plain_unet():
    torch.manual_seed(0)
    unet = build_unet("tiny", (32, 32), build_vae("tiny", (32, 32)), num_classes=2)
    model = UNetForTraining(unet, changes=5, features=7)
    torch.nn.init.normal_(model.told.weight)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        plain = unet(*inputs).sample
        assert torch.equal(model(*inputs, torch.zeros(2, 5))[0], plain)
        assert not torch.allclose(model(*inputs, torch.ones(2, 5))[0], plain, atol=1e-3)
        assert torch.equal(unet(*inputs).sample, plain), "nothing is kept after a forward pass"
    _, predicted_features = model(*inputs, torch.ones(2, 5))
    assert predicted_features.shape == (2, 7, 8 // inner_stride(unet), 8 // inner_stride(unet)) == (2, 7, 4, 4)
    predicted_features.mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0, "the loss on the predicted features trains the UNet"
    assert unet.conv_out.weight.grad is None
    assert model.told.weight.grad.abs().sum() > 0
    bare = UNetForTraining(unet, changes=0, features=0)
    assert len(list(bare.parameters())) == len(list(unet.parameters()))
    assert bare(*inputs, torch.zeros(2, 0))[1].shape[1] == 0
    without_classes = UNetForTraining(
        build_unet("tiny", (32, 32), build_vae("tiny", (32, 32)), num_classes=None), changes=0, features=0
    )
    model_pred, _ = without_classes(*inputs, torch.zeros(2, 0))
    assert torch.equal(model_pred, without_classes.unet(*inputs[:2]).sample), "labels are ignored"


def test_a_compiled_unet_for_training_equals_the_uncompiled_one():
    torch.manual_seed(0)
    model = UNetForTraining(
        build_unet("tiny", (32, 32), build_vae("tiny", (32, 32)), num_classes=2), changes=5, features=7
    )
    torch.nn.init.normal_(model.told.weight)
    names = list(model.state_dict())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 2])
    plain = [model(*inputs, crop_params) for crop_params in torch.ones(3, 2, 5).cumsum(0)]
    graphs = []
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for crop_params, expected in zip(torch.ones(3, 2, 5).cumsum(0), plain, strict=True):
        for output, expected_output in zip(model(*inputs, crop_params), expected, strict=True):
            assert torch.allclose(output, expected_output, atol=1e-6)
    assert len(graphs) == 1, "there must be one graph, compiled once"
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_gradient_checkpointing_does_not_change_the_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vae = build_vae("tiny", (32, 32))
        model = vae if kind == "vae" else build_unet("tiny", (32, 32), vae, num_classes=2)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        inputs = (
            (torch.rand(2, 3, 32, 32),)
            if kind == "vae"
            else (torch.rand(2, 4, 8, 8), torch.tensor([3, 9]), torch.tensor([0, 2]))
        )
        model(*inputs).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("config", ["tiny", "base", "unet.json"])
def test_every_attention_layer_has_a_group_norm(config, tmp_path):
    """UNet2DModel leaves out one group norm if resnet_time_scale_shift is "scale_shift". `build_unet` adds it.

    Without it, the activations of the tiny UNet grew until the loss was NaN.
    """
    (tmp_path / "unet.json").write_text(json.dumps(UNET_CONFIG | {"resnet_time_scale_shift": "scale_shift"}))
    config = str(tmp_path / config) if config.endswith("json") else config
    unet = build_unet(config, (64, 64), build_vae("tiny", (64, 64)), 2)
    assert all(module.group_norm is not None for module in unet.modules() if isinstance(module, Attention))


def test_the_large_presets_can_be_built():
    with torch.device("meta"):  # computes shapes and needs no memory
        vae = build_vae("large", (128, 128))
        unet = build_unet("large", (128, 128), vae, num_classes=6)
    assert unet.config.sample_size == 16
    assert [round(sum(p.numel() for p in model.parameters()) / 1e6) for model in (vae, unet)] == [4, 144]


@pytest.mark.parametrize(("factor", "channels"), [(4, [16, 32, 64]), (8, [16, 32, 64, 64]), (16, [16, 32, 64, 64, 64])])
def test_downsample_sets_the_size_of_the_latents(factor, channels):
    vae = build_vae("tiny", (64, 64), latent_dim=6, downsample=factor)
    assert list(vae.config.block_out_channels) == channels
    assert downsample_factor(vae) == factor
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 6, 64 // factor, 64 // factor)


def test_the_error_for_a_size_that_does_not_fit_names_the_nearest_sizes():
    with pytest.raises(
        UserError, match=r"--image-size 100x150: the VAE can take multiples of 8 px: give 96x144 or 104x152"
    ):
        build_vae("large", (100, 150))
    with pytest.raises(UserError, match=r"--image-size 5: .* give 8$"):
        build_vae("large", (5, 5))
    with pytest.raises(
        UserError, match=r"--image-size 72: the VAE and the UNet can take multiples of 32 px: give 64 or 96"
    ):
        build_unet("base", (72, 72), build_vae("large", (72, 72)), None)


def test_a_config_of_the_user_is_used_and_its_errors_are_reported(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(UNET_CONFIG | {"_class_name": "UNet2DModel"}))
    unet = build_unet(str(path), (32, 32), build_vae("tiny", (32, 32)), None)
    assert unet.config.dropout == UNET_CONFIG["dropout"]
    assert build_unet(str(path), (32, 32), build_vae("tiny", (32, 32)), None, dropout=0.3).config.dropout == 0.3
    assert unet.config.block_out_channels == [16, 32]
    assert unet.config.num_class_embeds is None
    for wrong in ({"norm_num_groups": 7}, {"norm_num_groups": 0}, {"attention_head_dim": 0}):
        path.write_text(json.dumps(UNET_CONFIG | wrong))
        with pytest.raises(UserError, match=r"--config .*mine.json is not a valid config of UNet2DModel"):
            build_unet(str(path), (32, 32), build_vae("tiny", (32, 32)), None)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="expected one JSON object"):
        build_vae(str(path), (32, 32))
    for channels in (None, 64, []):
        path.write_text(json.dumps({"block_out_channels": channels}))
        with pytest.raises(UserError, match=r"--config .*mine.json: block_out_channels must be a list"):
            build_vae(str(path), (32, 32))


def test_the_group_norms_of_the_presets_have_enough_channels_per_group():
    """A group of one or two channels loses the brightness of the photo.

    The PSNR of the tiny VAE was 0.8 dB lower with such groups, that of the base VAE 3 dB.
    """
    for preset in ("tiny", "base", "large"):
        values = load_config("vae", preset)
        assert min(values["block_out_channels"]) >= 8 * values["norm_num_groups"]
        values = load_config("unet", preset)
        assert min(values["block_out_channels"]) >= 2 * values["norm_num_groups"]


def test_the_receptive_field_of_the_discriminator_is_that_of_its_docstring():
    """A logit depends on the pixels that have a gradient. They form a square with sides of 26 px."""
    discriminator = build_discriminator()
    for layer in discriminator:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.ones_(layer.weight)
    # without the norms, which depend on all pixels
    convolutions = torch.nn.Sequential(*(layer for layer in discriminator if isinstance(layer, torch.nn.Conv2d)))
    photo = torch.zeros(1, 3, 64, 64, requires_grad=True)
    convolutions(photo)[0, 0, 8, 8].backward()
    rows = photo.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 26
    assert "26 x 26 px" in build_discriminator.__doc__


def test_entries_that_diffusers_does_not_know_are_refused(tmp_path):
    """diffusers would leave them out, and build its own default model."""
    path = tmp_path / "unet.json"
    path.write_text(json.dumps({"dim": 64, "dim_mults": [1, 2, 4, 8], "_diffusers_version": "0.40.0"}))
    with pytest.raises(
        UserError, match="UNet2DModel of this diffusers has no dim, dim_mults: remove it, or begin with"
    ):
        load_config("unet", str(path))


def test_the_config_of_another_model_is_refused(tmp_path):
    path = tmp_path / "dit.json"
    path.write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(UserError, match="is the config of DiTTransformer2DModel: give one of UNet2DModel"):
        load_config("unet", str(path))
