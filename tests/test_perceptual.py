"""The frozen networks."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corel_diffusers.data.scenes import draw_scenes
from corel_diffusers.data.transforms import open_photo
from corel_diffusers.files import UserError
from corel_diffusers.perceptual import EfficientNetLiteFeatures, PerceptualLoss, load_efficientnet


@pytest.mark.parametrize("side_px", [64, 120])
def test_features_are_those_of_the_packages_own_network(library_efficientnet, side_px):
    seen = {}
    hooks = [
        library_efficientnet._blocks[place].register_forward_hook(lambda *call, place=place: seen.update({place: call[-1]}))
        for place in EfficientNetLiteFeatures.TAPS
    ]
    pictures = torch.rand(2, 3, side_px, side_px) * 2 - 1
    seen_at_the_end = library_efficientnet.extract_features(((pictures + 1) / 2 - 0.498) / 0.502)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        ours = EfficientNetLiteFeatures()(pictures)
        at_the_end = load_efficientnet().extract_features(((pictures + 1) / 2 - 0.498) / 0.502)
    for found, place in zip(ours, EfficientNetLiteFeatures.TAPS, strict=True):
        assert torch.allclose(found, seen[place], atol=1e-4)
    assert torch.allclose(at_the_end, seen_at_the_end, atol=1e-4)


def test_gradients_are_those_of_the_packages_own_network_also_within_bf16(library_efficientnet):
    torch.manual_seed(0)
    picture, reference = (torch.rand(2, 3, 128, 128) * 2 - 1).requires_grad_(), torch.rand(2, 3, 128, 128) * 2 - 1
    theirs, ours = PerceptualLoss("efficientnet-lite0"), PerceptualLoss("efficientnet-lite0")
    theirs.network = EfficientNetLiteFeatures(library_efficientnet)
    (expected,) = torch.autograd.grad(theirs(picture, reference), picture)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(ours(picture, reference), picture)
    assert (found - expected).norm() < 0.03 * expected.norm(), "a few activations at a kink of ReLU6 may fall on its other side"


def test_the_distance_is_that_of_features_of_unit_length():
    torch.manual_seed(0)
    loss, (picture, reference) = PerceptualLoss("efficientnet-lite0"), torch.rand(2, 1, 3, 96, 96) * 2 - 1
    picture.requires_grad_()
    pairs = zip(loss.network(picture), loss.network(reference), strict=True)
    expected = sum(F.mse_loss(F.normalize(a, dim=1), F.normalize(b, dim=1)) * a.shape[1] for a, b in pairs) / 4
    found = loss(picture, reference)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = [torch.autograd.grad(value, picture)[0] for value in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_distance_is_zero_for_the_same_and_grows_with_blur():
    pictures = torch.stack(
        [torch.frombuffer(bytearray(open_photo(r["bytes"]).tobytes()), dtype=torch.uint8).view(128, 128, 3) for r in scenes()]
    )
    pictures = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    loss = PerceptualLoss("efficientnet-lite0")
    blurred = [F.interpolate(F.avg_pool2d(pictures, k), size=(128, 128), mode="bilinear") for k in (2, 4, 8)]
    distances = [float(loss(picture, pictures)) for picture in (pictures, *blurred)]
    assert distances[0] == 0
    assert distances == sorted(distances)


def scenes() -> list[dict]:
    from datasets import Image

    return draw_scenes(4).cast_column("image", Image(decode=False))["image"][:]


def test_small_pictures_are_looked_at_in_a_size_that_the_network_knows():
    loss, (a, b) = PerceptualLoss("efficientnet-lite0"), torch.rand(2, 1, 3, 64, 64) * 2 - 1
    large = [F.interpolate(picture, size=(96, 96), mode="bilinear") for picture in (a, b)]
    assert float(loss(a, b)) == pytest.approx(float(loss(*large)), rel=1e-4)
    assert [f.shape[-1] for f in loss.features(a)] == [48, 24, 12, 6]
    assert [f.shape[-1] for f in loss.features(torch.zeros(1, 3, 128, 128))] == [64, 32, 16, 8], "larger ones stay as they are"


def test_vgg16_without_torchvision_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"--perceptual-network vgg16 .* efficientnet-lite0"):
        PerceptualLoss("vgg16")


def test_vgg16_takes_the_five_activations_of_torchvisions_layers(monkeypatch):
    """torchvision is no dependency: its published layer list (configuration D) stands in for it, with random weights."""
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
    loss = PerceptualLoss("vgg16", min_side_px=32)
    features = loss.features(torch.rand(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == [64, 128, 256, 512, 512]
    assert [f.shape[-1] for f in features] == [32, 16, 8, 4, 2]
    picture = torch.rand(1, 3, 32, 32, requires_grad=True)
    loss(picture, torch.rand(1, 3, 32, 32)).backward()
    assert picture.grad.abs().sum() > 0
