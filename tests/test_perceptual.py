"""The frozen networks and the perceptual distance."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corel_diffusers.data.decoding import open_photo
from corel_diffusers.data.scenes import draw_scenes
from corel_diffusers.files import UserError
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.models.efficientnet import EfficientNetLiteFeatures, load_efficientnet


@pytest.mark.parametrize("side_px", [64, 120])
def test_features_equal_those_of_the_original_package(library_efficientnet, side_px):
    block_outputs = {}
    hooks = [
        library_efficientnet._blocks[index].register_forward_hook(
            lambda *call, index=index: block_outputs.update({index: call[-1]})
        )
        for index in EfficientNetLiteFeatures.TAPS
    ]
    images = torch.rand(2, 3, side_px, side_px) * 2 - 1
    expected_final = library_efficientnet.extract_features(((images + 1) / 2 - 0.498) / 0.502)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        features = EfficientNetLiteFeatures()(images)
        final = load_efficientnet().extract_features(((images + 1) / 2 - 0.498) / 0.502)
    for feature, index in zip(features, EfficientNetLiteFeatures.TAPS, strict=True):
        assert torch.allclose(feature, block_outputs[index], atol=1e-4)
    assert torch.allclose(final, expected_final, atol=1e-4)


def test_gradients_under_bf16_autocast_equal_those_of_the_original_package(library_efficientnet):
    torch.manual_seed(0)
    images, references = (torch.rand(2, 3, 128, 128) * 2 - 1).requires_grad_(), torch.rand(2, 3, 128, 128) * 2 - 1
    original_loss, loss = PerceptualLoss("efficientnet-lite0"), PerceptualLoss("efficientnet-lite0")
    original_loss.network = EfficientNetLiteFeatures(library_efficientnet)
    (expected,) = torch.autograd.grad(original_loss(images, references), images)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(loss(images, references), images)
    assert (gradient - expected).norm() < 0.03 * expected.norm(), (
        "the tolerance is for a few activations that rounding moves across a kink of ReLU6"
    )


def test_the_distance_uses_features_of_unit_length():
    torch.manual_seed(0)
    loss, (image, reference) = PerceptualLoss("efficientnet-lite0"), torch.rand(2, 1, 3, 96, 96) * 2 - 1
    image.requires_grad_()
    pairs = zip(loss.network(image), loss.network(reference), strict=True)
    expected = sum(F.mse_loss(F.normalize(a, dim=1), F.normalize(b, dim=1)) * a.shape[1] for a, b in pairs) / 4
    distance = loss(image, reference)
    assert float(distance.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = [torch.autograd.grad(value, image)[0] for value in (distance, expected)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_the_distance_is_zero_for_the_same_images_and_grows_with_blur():
    images = torch.stack(
        [
            torch.frombuffer(bytearray(open_photo(row["bytes"]).tobytes()), dtype=torch.uint8).view(128, 128, 3)
            for row in scenes()
        ]
    )
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    loss = PerceptualLoss("efficientnet-lite0")
    blurred = [F.interpolate(F.avg_pool2d(images, k), size=(128, 128), mode="bilinear") for k in (2, 4, 8)]
    distances = [float(loss(batch, images)) for batch in (images, *blurred)]
    assert distances[0] == 0
    assert distances == sorted(distances)


def scenes() -> list[dict]:
    from datasets import Image

    return draw_scenes(4).cast_column("image", Image(decode=False))["image"][:]


def test_small_images_are_enlarged_for_the_network():
    loss, (a, b) = PerceptualLoss("efficientnet-lite0"), torch.rand(2, 1, 3, 64, 64) * 2 - 1
    enlarged = [F.interpolate(image, size=(96, 96), mode="bilinear") for image in (a, b)]
    assert float(loss(a, b)) == pytest.approx(float(loss(*enlarged)), rel=1e-4)
    assert [f.shape[-1] for f in loss.features(a)] == [48, 24, 12, 6]
    assert [f.shape[-1] for f in loss.features(torch.zeros(1, 3, 128, 128))] == [64, 32, 16, 8], (
        "larger images are not resized"
    )
    assert loss.features(torch.zeros(1, 3, 64, 96))[0].shape[-2:] == (39, 58), "the area is that of 96 x 96"


def test_the_error_for_vgg16_without_torchvision_names_the_alternative(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"--perceptual-network vgg16 .* efficientnet-lite0"):
        PerceptualLoss("vgg16")


def test_vgg16_returns_five_activations_of_the_layers_of_torchvision(monkeypatch):
    """torchvision is not a dependency. The test builds its list of layers (configuration D) with random weights."""
    layers, channels = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    models = types.ModuleType("torchvision.models")
    models.VGG16_Weights = types.SimpleNamespace(IMAGENET1K_V1=None)
    models.vgg16 = lambda weights: types.SimpleNamespace(features=nn.Sequential(*layers))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    loss = PerceptualLoss("vgg16", side_px=32)
    features = loss.features(torch.rand(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == [64, 128, 256, 512, 512]
    assert [f.shape[-1] for f in features] == [32, 16, 8, 4, 2]
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    loss(image, torch.rand(1, 3, 32, 32)).backward()
    assert image.grad.abs().sum() > 0
