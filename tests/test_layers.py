"""The layers of models in training against diffusers' own: the same function of the same weights."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from torch.nn import functional as F

from corel_diffusers.models import build_unet, build_vae, from_config, layers, load_config
from corel_diffusers.models.layers import GroupNorm, ResidualBlock, Upsample

MODELS = {
    "vae": (AutoencoderKL, load_config("vae", "tiny") | {"sample_size": 32, "mid_block_add_attention": True}),
    "unet": (UNet2DModel, load_config("unet", "tiny") | {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_class_embeds": 3}),
    "unet, time added, resnets that halve and double": (
        UNet2DModel,
        load_config("unet", "tiny")
        | {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_class_embeds": 3, "mid_block_scale_factor": 2.0}
        | {"resnet_time_scale_shift": "default", "downsample_type": "resnet", "upsample_type": "resnet"},
    ),
}
MODELS["vae"][1].update(
    {f"{way}_block_types": [f"{way.title()}{coder}Block2D"] * 3 for way, coder in (("down", "Encoder"), ("up", "Decoder"))}
)


def inputs_of(model: torch.nn.Module) -> tuple:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, AutoencoderKL):
        return (torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=generator),)
    latents = torch.randn(2, 4, 16, 24, dtype=torch.float64, generator=generator)
    return latents, torch.tensor([10, 900]), torch.tensor([0, 2])


@pytest.mark.parametrize("from_positions", [1, 10**9])
@pytest.mark.parametrize("fused_attention", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_are_those_of_diffusers_own_layers(name, fused_attention, from_positions, monkeypatch, tmp_path):
    monkeypatch.setattr(layers, "FROM_POSITIONS", from_positions)
    kernel = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(fused_attention)
    try:
        torch.manual_seed(0)
        model = from_config(*MODELS[name], "").double().train()
        for parameter in model.parameters():  # biases and norms start at values that hide mistakes
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path)
        plain = type(model).from_pretrained(tmp_path, torch_dtype=torch.float64).train()
        assert not any(isinstance(part, (ResidualBlock, Upsample, GroupNorm)) for part in plain.modules())
        assert sum(isinstance(part, ResidualBlock) for part in model.modules()) >= 5
        if name != "unet, time added, resnets that halve and double":
            assert any(isinstance(part, Upsample) for part in model.modules())
            assert not any(type(part) is ResnetBlock2D for part in model.modules())
        attentions = [part.processor for part in model.modules() if isinstance(part, Attention)]
        assert attentions
        assert all(isinstance(processor, AttnProcessor) != fused_attention for processor in attentions)
        made, expected = model(*inputs_of(model)).sample, plain(*inputs_of(plain)).sample
        made.square().sum().backward()
        expected.square().sum().backward()
    finally:
        torch.backends.cuda.enable_flash_sdp(kernel)
    assert (made - expected).norm() < 1e-7 * expected.norm()
    wanted = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        if key.endswith("to_k.bias"):  # adds the same to all scores of a query: its gradient is rounding alone
            continue
        expected = wanted[key].grad  # diffusers' plain attention takes a VAE's softmax in float32
        assert (parameter.grad - expected).norm() <= 1e-6 * expected.norm() + 1e-9, key


def test_dropout_draws_the_same():
    values = load_config("unet", "tiny") | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "dropout": 0.5}
    torch.manual_seed(0)
    model, plain = from_config(UNet2DModel, values, ""), UNet2DModel.from_config(values)
    plain.load_state_dict(model.state_dict())
    latents, found = torch.randn(2, 4, 8, 8), []
    for each in (model.train(), plain.train().to(memory_format=torch.channels_last)):
        torch.manual_seed(1)
        found.append(each(latents, 10).sample)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize(("groups", "channels"), [(2, 16), (4, 96), (2, 32)])
def test_a_norm_in_bf16_is_as_exact_as_bf16_allows(groups, channels):
    torch.manual_seed(0)
    values = (3 * torch.randn(2, channels, 16, 16) + 1).bfloat16().to(memory_format=torch.channels_last)
    norm, weights = GroupNorm(groups, channels), torch.randn(2, channels, 16, 16)
    torch.nn.init.normal_(norm.weight)
    found = []
    for given, function in ((values, norm), (values.float(), lambda x: F.group_norm(x, groups, norm.weight, norm.bias))):
        given = given.clone().requires_grad_()
        made = function(given)
        found.append(
            (made.float(), *torch.autograd.grad((made.float() * weights.to(made.dtype).float()).sum(), (given, norm.weight, norm.bias)))
        )
    for made, exact in zip(*found, strict=True):
        assert (made.float() - exact).norm() < 0.01 * exact.norm()
    assert norm(values).dtype == torch.bfloat16
    assert norm(values).is_contiguous(memory_format=torch.channels_last)


def test_presets_in_bf16_are_near_to_diffusers_own_in_float32():
    torch.manual_seed(0)
    vae = build_vae("tiny", (64, 64))
    unet = build_unet("tiny", (64, 64), vae, num_classes=2)
    photos, latents = torch.rand(4, 3, 64, 64), torch.randn(4, 4, 16, 16)
    for model, inputs in ((vae, (photos,)), (unet, (latents, torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 0])))):
        plain = type(model).from_config(model.config)
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                made = model(*inputs).sample
            assert (made.float() - plain(*inputs).sample).norm() < 0.03 * plain(*inputs).sample.norm()
