"""The features that the UNet is aligned with, and the alignment loss."""

import numpy as np
import torch
from torch.nn import functional as F

from corel_diffusers.data.features import cache_features, feature_scale
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.losses.alignment import alignment_loss
from corel_diffusers.models.efficientnet import EfficientNetLiteFeatures

CPU = torch.device("cpu")


def test_cached_features_are_the_average_pooled_features_of_the_network(raw_photos):
    pixels = cache_pixels(load_photos(raw_photos), (32, 32))[1]["train"]
    features = cache_features(pixels, None, 16, CPU)
    photos = pixels.batch(slice(0, 3)).flip(-1)
    with torch.no_grad():
        enlarged = F.interpolate(photos, (128, 128), mode="bilinear")
        full_features = EfficientNetLiteFeatures().eval()(enlarged)[-1]  # 8 x 8
    expected = full_features.unflatten(-1, (2, 4)).unflatten(-3, (2, 4)).mean((-1, -3))
    assert features.shape == (len(pixels), 2, 112, 2, 2)
    assert np.allclose(features[:3, 1], expected, atol=1e-4)


def test_for_a_finer_grid_the_cache_keeps_the_size_of_the_features_and_the_loss_repeats_them(raw_photos):
    pixels = cache_pixels(load_photos(raw_photos), (32, 32))[1]["train"]
    features = torch.from_numpy(cache_features(pixels, None, 2, CPU)[:3, 0])
    assert features.shape == (3, 112, 8, 8)
    mean, std = feature_scale(features[:, None].numpy(), CPU)
    predicted = torch.randn(3, 112, 16, 16, generator=torch.Generator().manual_seed(0))
    repeated = F.adaptive_avg_pool2d(features, (16, 16))  # each value four times
    assert torch.allclose(
        alignment_loss(predicted, features, mean, std), alignment_loss(predicted, repeated, mean, std), atol=1e-6
    )


def test_alignment_loss_is_one_minus_the_cosine_of_standardised_features():
    generator = torch.Generator().manual_seed(0)
    features = 5 + 3 * torch.randn(50, 2, 6, 2, 3, generator=generator)
    mean, std = feature_scale(features.numpy(), CPU)
    standardised = (features[:, 0] - mean) / std
    assert torch.allclose(standardised.mean((0, 2, 3)), torch.zeros(6), atol=0.2)
    assert torch.allclose(alignment_loss(2 * standardised, features[:, 0], mean, std), torch.zeros(50), atol=1e-5)
    assert torch.allclose(alignment_loss(-standardised, features[:, 0], mean, std), torch.full((50,), 2.0), atol=1e-5)
    unrelated = alignment_loss(torch.randn(50, 6, 2, 3, generator=generator), features[:, 0], mean, std).mean()
    assert 0.8 < unrelated < 1.2
