"""The layers of models in training against diffusers' own: the same function of the same weights."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models import resnet, upsampling
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch.nn import functional as F

from corel_diffusers.models import from_config, layers, load_config

VAE = load_config("vae", "tiny") | {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "mid_block_add_attention": True,
}
UNET = load_config("unet", "tiny") | {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_class_embeds": 3}
MODELS = {
    "vae": (AutoencoderKL, VAE),
    "unet": (UNet2DModel, UNET),
    "time added, blocks that halve and double": (
        UNet2DModel,
        UNET
        | {"resnet_time_scale_shift": "default", "downsample_type": "resnet", "upsample_type": "resnet", "mid_block_scale_factor": 2.0},
    ),
    "skips": (
        UNet2DModel,
        UNET
        | {"in_channels": 3, "out_channels": 3, "resnet_time_scale_shift": "default"}
        | {"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"]}
        | {"up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"]},
    ),
}
OWN = layers.ResnetBlock2D, layers.Upsample2D, layers.GroupNorm


@pytest.fixture(params=["fused", "math"])
def attention(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernel of attention that models are built for, as precision.use chooses it."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(request.param == "fused")
    yield request.param
    torch.backends.cuda.enable_flash_sdp(before)


def pair(name: str, dtype: torch.dtype, spread: float = 0.1) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model of ours and diffusers' own with its weights, which are so far from fresh ones."""
    torch.manual_seed(0)
    kind, values = MODELS[name]
    model = from_config(kind, values, "").train()
    for parameter in model.parameters():  # biases and norms start at values that hide mistakes
        parameter.data += spread * torch.randn_like(parameter)
    plain = kind.from_config(values).train()
    plain.load_state_dict(model.state_dict())
    return model.to(dtype), plain.to(dtype)


def output_and_gradients(model: torch.nn.Module, batch: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a fixed input, and of a fixed sum of what is made of it. Not of a key's bias, which adds the same to all scores of a query: its
    gradient is rounding alone."""
    generator, weight = torch.Generator().manual_seed(0), next(model.parameters())

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=weight.dtype, generator=generator).to(weight.device)

    if isinstance(model, AutoencoderKL):
        inputs = (drawn(batch, 3, 32, 48),)
    else:
        places = torch.arange(batch, device=weight.device)
        inputs = drawn(batch, model.config.in_channels, 16, 24), places * 300 + 10, places % 3
    made = model(*inputs).sample
    (made * drawn(*made.shape)).sum().backward()
    return made, {name: p.grad for name, p in model.named_parameters() if p.grad is not None and not name.endswith("to_k.bias")}


@pytest.mark.parametrize("from_positions", [1, 10**9])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_are_those_of_diffusers_own_layers(name, attention, from_positions, monkeypatch):
    monkeypatch.setattr(layers, "FROM_POSITIONS", from_positions)
    model, plain = pair(name, torch.float64)
    assert not any(isinstance(part, OWN) for part in plain.modules())
    assert not any(type(part) in (resnet.ResnetBlock2D, torch.nn.GroupNorm) for part in model.modules())
    assert not any(type(part) is upsampling.Upsample2D and part.use_conv for part in model.modules())
    processors = [part.processor for part in model.modules() if isinstance(part, Attention)]
    assert processors
    assert all(isinstance(processor, AttnProcessor) == (attention == "math") for processor in processors)
    made, gradients = output_and_gradients(model)
    expected, wanted = output_and_gradients(plain)
    assert (made - expected).norm() < 1e-6 * expected.norm()  # diffusers' plain attention takes its softmax in float32
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        assert (gradient - wanted[key]).norm() <= 1e-5 * wanted[key].norm() + 1e-8, key


@pytest.mark.parametrize(
    ("device", "precision", "alike"),
    [
        ("cpu", torch.float32, 0.9999),
        ("cpu", torch.bfloat16, 0.99),
        pytest.param("cuda", torch.float16, 0.999, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("name", ["vae", "unet"])
def test_in_training_they_are_near_to_diffusers_own_in_float32(name, device, precision, alike, attention, monkeypatch):
    monkeypatch.setattr(layers, "FROM_POSITIONS", 1)
    model, plain = (each.to(device) for each in pair(name, torch.float32, spread=0.01))
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        made, gradients = output_and_gradients(model, batch=4)
    expected, wanted = output_and_gradients(plain, batch=4)
    gradient, wanted = (torch.cat([found[key].flatten() for key in wanted]) for found in (gradients, wanted))
    assert torch.cosine_similarity(made.float().flatten(), expected.flatten(), dim=0) > alike
    assert torch.cosine_similarity(gradient, wanted, dim=0) > alike


def test_what_is_saved_is_diffusers_own(tmp_path):
    model, plain = pair("vae", torch.float32)
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "diffusers")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "diffusers" / file).read_bytes()
    assert not any(isinstance(part, OWN) for part in AutoencoderKL.from_pretrained(tmp_path / "ours").modules())


def test_dropout_draws_the_same():
    values, found = UNET | {"dropout": 0.5}, []
    model, plain = from_config(UNet2DModel, values, "").train(), UNet2DModel.from_config(values).train()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain.to(memory_format=torch.channels_last)):
        torch.manual_seed(1)
        found.append(output_and_gradients(each)[0])
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize(("groups", "channels"), [(2, 16), (4, 96), (2, 32)])
def test_a_norm_of_narrow_groups_is_that_of_float32(groups, channels):
    torch.manual_seed(0)
    values = (3 * torch.randn(2, channels, 16, 16) + 1).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    norm, weights = layers.GroupNorm(groups, channels), torch.randn(2, channels, 16, 16).bfloat16()
    torch.nn.init.normal_(norm.weight)
    made, exact = norm(values), F.group_norm(values.float(), groups, norm.weight, norm.bias)
    narrow = channels // groups % 16 != 0
    assert torch.equal(made, exact.bfloat16()) == narrow
    assert made.is_contiguous(memory_format=torch.channels_last)
    for found, wanted in zip(
        *(torch.autograd.grad((y * weights).sum(), (values, norm.weight, norm.bias)) for y in (made, exact)), strict=True
    ):
        assert (found.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()
