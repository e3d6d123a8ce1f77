"""The layers of layers.py compute the same functions as the layers of diffusers with the same weights."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models import resnet, upsampling
from diffusers.models.attention_processor import Attention, AttnProcessor
from packaging.version import Version
from torch.nn import functional as F

from corel_diffusers.models import layers
from corel_diffusers.models.configs import from_config, load_config

VAE = load_config("vae", "tiny") | {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "mid_block_add_attention": True,
}
UNET = load_config("unet", "tiny") | {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_class_embeds": 3}
MODELS = {
    "vae": (AutoencoderKL, VAE),
    "unet": (UNet2DModel, UNET),
    "added time embedding, resnet down- and upsampling": (
        UNet2DModel,
        UNET
        | {
            "resnet_time_scale_shift": "default",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "mid_block_scale_factor": 2.0,
        },
    ),
    "skips": (
        UNet2DModel,
        UNET
        | {"in_channels": 3, "out_channels": 3, "resnet_time_scale_shift": "default"}
        | {"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"]}
        | {"up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"]},
    ),
}
FAST_LAYERS = layers.ResnetBlock2D, layers.Upsample2D, layers.GroupNorm


def fast_and_plain_model(
    name: str, dtype: torch.dtype, spread: float = 0.1, attention: str = "fused"
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a model with the fast layers, and a plain diffusers model with the same weights.

    Args:
        name: a key of MODELS.
        spread: standard deviation of the noise that is added to the initial weights.
    """
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = from_config(model_class, config, "", attention).train()
    for parameter in model.parameters():  # initial biases of 0 and norm weights of 1 would hide mistakes
        parameter.data += spread * torch.randn_like(parameter)
    plain = model_class.from_config(config).train()
    plain.load_state_dict(model.state_dict())
    return model.to(dtype), plain.to(dtype)


def output_and_gradients(model: torch.nn.Module, batch: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output for a fixed input, and the gradients of a fixed weighted sum of the output.

    The biases of attention keys are left out. Such a bias adds the same value to all scores of a query, so its gradient
    is only rounding error.
    """
    generator, weight = torch.Generator().manual_seed(0), next(model.parameters())

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=weight.dtype, generator=generator).to(weight.device)

    if isinstance(model, AutoencoderKL):
        inputs = (randn(batch, 3, 32, 48),)
    else:
        indices = torch.arange(batch, device=weight.device)
        inputs = randn(batch, model.config.in_channels, 16, 24), indices * 300 + 10, indices % 3
    output = model(*inputs).sample
    (output * randn(*output.shape)).sum().backward()
    return output, {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None and not name.endswith("to_k.bias")
    }


@pytest.mark.parametrize("attention", ["fused", "math"])
@pytest.mark.parametrize("min_positions", [1, 10**9])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_equal_those_of_diffusers(name, attention, min_positions, monkeypatch):
    if name == "skips" and Version(diffusers.__version__) < Version("0.39"):
        pytest.skip("the skip blocks of diffusers before 0.39 compute in float32 only")
    monkeypatch.setattr(layers, "FROM_POSITIONS", min_positions)
    model, plain = fast_and_plain_model(name, torch.float64, attention=attention)
    assert not any(isinstance(module, FAST_LAYERS) for module in plain.modules())
    assert not any(type(module) in (resnet.ResnetBlock2D, torch.nn.GroupNorm) for module in model.modules())
    assert not any(type(module) is upsampling.Upsample2D and module.use_conv for module in model.modules())
    processors = [module.processor for module in model.modules() if isinstance(module, Attention)]
    assert processors
    assert all(isinstance(processor, AttnProcessor) == (attention == "math") for processor in processors)
    expected, expected_gradients = output_and_gradients(plain)
    output, gradients = output_and_gradients(model)
    # not closer, because AttnProcessor of diffusers computes the softmax in float32
    assert (output - expected).norm() < 1e-6 * expected.norm()
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        assert (gradient - expected_gradients[key]).norm() <= 1e-5 * expected_gradients[key].norm() + 1e-8, key


@pytest.mark.parametrize(
    ("device", "precision", "min_cosine"),
    [
        ("cpu", torch.float32, 0.9999),
        ("cpu", torch.bfloat16, 0.99),
        pytest.param("cuda", torch.float16, 0.999, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("attention", ["fused", "math"])
@pytest.mark.parametrize("name", ["vae", "unet"])
def test_mixed_precision_is_close_to_diffusers_in_float32(name, device, precision, min_cosine, attention, monkeypatch):
    monkeypatch.setattr(layers, "FROM_POSITIONS", 1)
    models = fast_and_plain_model(name, torch.float32, 0.01, attention)
    model, plain = (module.to(device) for module in models)
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        output, gradients = output_and_gradients(model, batch=4)
    expected, expected_gradients = output_and_gradients(plain, batch=4)
    gradient, expected_gradient = (
        torch.cat([grads[key].flatten() for key in expected_gradients]) for grads in (gradients, expected_gradients)
    )
    assert torch.cosine_similarity(output.float().flatten(), expected.flatten(), dim=0) > min_cosine
    assert torch.cosine_similarity(gradient, expected_gradient, dim=0) > min_cosine


def test_saved_files_equal_those_of_diffusers(tmp_path):
    model, plain = fast_and_plain_model("vae", torch.float32)
    model.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "diffusers")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "diffusers" / file).read_bytes()
    assert not any(
        isinstance(module, FAST_LAYERS) for module in AutoencoderKL.from_pretrained(tmp_path / "fast").modules()
    )


def test_dropout_masks_equal_those_of_diffusers():
    config, outputs = UNET | {"dropout": 0.5}, []
    model, plain = from_config(UNet2DModel, config, "").train(), UNet2DModel.from_config(config).train()
    plain.load_state_dict(model.state_dict())
    for unet in (model, plain.to(memory_format=torch.channels_last)):
        torch.manual_seed(1)
        outputs.append(output_and_gradients(unet)[0])
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(("groups", "channels"), [(2, 16), (4, 96), (2, 32)])
def test_group_norm_of_small_groups_is_computed_in_float32(groups, channels):
    torch.manual_seed(0)
    hidden_states = (
        (3 * torch.randn(2, channels, 16, 16) + 1).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    )
    norm, weights = layers.GroupNorm(groups, channels), torch.randn(2, channels, 16, 16).bfloat16()
    torch.nn.init.normal_(norm.weight)
    output, expected = norm(hidden_states), F.group_norm(hidden_states.float(), groups, norm.weight, norm.bias)
    narrow = channels // groups % 16 != 0
    assert torch.equal(output, expected.bfloat16()) == narrow
    assert output.is_contiguous(memory_format=torch.channels_last)
    for gradient, expected_gradient in zip(
        *(
            torch.autograd.grad((y * weights).sum(), (hidden_states, norm.weight, norm.bias))
            for y in (output, expected)
        ),
        strict=True,
    ):
        assert (gradient.float() - expected_gradient.float()).norm() < 0.01 * expected_gradient.float().norm()
