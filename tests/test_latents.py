"""The cached posteriors are compared with the VAE itself, and the scale of the latents is tested."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from corel_diffusers.data import versions
from corel_diffusers.data.augmented_crops import CROP_CONDITIONS, AugmentedCrops, pick_versions, random_crops
from corel_diffusers.data.latents import (
    cache_moments,
    config_key,
    load_vae,
    measure_latents,
    sample_posterior,
    scale_latents,
    weights_key,
)
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_large_pixels, cache_pixels
from corel_diffusers.files import UserError
from corel_diffusers.models.vae import build_vae
from pipeline import CorelPipeline


@pytest.fixture(scope="module")
def pixels(raw_photos):
    return cache_pixels(load_photos(raw_photos), (32, 32))[1]["train"]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae("tiny", (32, 32), latent_dim=4).eval()


def test_cached_moments_equal_the_posterior_of_the_vae(vae, pixels):
    moments = cache_moments(vae, pixels, torch.device("cpu"))
    photos = pixels.batch(slice(None))
    for mirrored, images in enumerate((photos, photos.flip(-1))):
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
        assert np.allclose(moments[:, mirrored, :4], posterior.mean, atol=1e-5)
        assert np.allclose(moments[:, mirrored, 4:], posterior.logvar, atol=1e-5)


def test_sample_posterior_equals_sampling_in_diffusers(vae, pixels):
    moments = torch.from_numpy(np.array(cache_moments(vae, pixels, torch.device("cpu"))))
    mirrored = torch.arange(len(moments)) % 2 == 0
    with torch.no_grad():
        photos = pixels.batch(slice(None))
        posterior = vae.encode(torch.where(mirrored.view(-1, 1, 1, 1), photos.flip(-1), photos)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = posterior.sample(generator=torch.Generator().manual_seed(3))
    assert torch.allclose(
        sample_posterior(moments[torch.arange(len(moments)), mirrored.long()], noise), expected, atol=1e-5
    )


def test_augmented_crops_are_encoded_with_matching_crop_parameters(vae, pixels, raw_photos):
    large = cache_large_pixels(load_photos(raw_photos), (32, 32))
    assert large.values.shape[1:3] == (48, 48), "photos of 48 px cannot be kept larger"
    crops = AugmentedCrops.of(large, 3, pixels)
    moments, crop_params = cache_moments(vae, pixels, torch.device("cpu"), crops=crops), crops.changes()
    assert np.array_equal(moments[:, :2], cache_moments(vae, pixels, torch.device("cpu"))), (
        "the photo and its mirror image come first"
    )
    assert moments.shape[1] == crop_params.shape[1] == 2 + 2 * 3
    assert crop_params.shape[2] == CROP_CONDITIONS
    full_tensors = [torch.from_numpy(np.array(part.values)) for part in (large, pixels)]
    for crop in range(3):
        images = random_crops(
            *full_tensors, torch.ones(len(pixels), dtype=torch.bool), crops.places[:, crop], crops.jitter[:, crop]
        )
        with torch.no_grad():
            mirrored = vae.encode(images.flip(-1)).latent_dist.mean
        assert np.allclose(moments[:, 3 + 2 * crop, :4], mirrored, atol=1e-4)
        crop_params_plain, crop_params_mirrored = crop_params[:, 2 + 2 * crop], crop_params[:, 3 + 2 * crop]
        assert np.array_equal(crop_params_plain * [1, 1, -1, 1, 1], crop_params_mirrored)
        assert np.allclose(crop_params_plain[:, 3:], crops.jitter[:, crop])
    assert not crop_params[:, :2].any(), "the crop parameters of a photo that is not augmented are 0"
    assert (crop_params[:, 2:, 0] > 0).all()
    assert (crop_params[:, 2:, 0] <= 0.5).all()


def test_photos_without_more_pixels_than_the_training_size_are_not_cropped(raw_photos):
    _, fitted = cache_pixels(load_photos(raw_photos), (48, 48))
    large = cache_large_pixels(load_photos(raw_photos), (48, 48))
    assert not AugmentedCrops.of(large, 3, fitted["train"]).changes()[..., :3].any()


@pytest.mark.parametrize("views", [0, 3])
def test_versions_are_picked_with_the_given_probabilities(views):
    picked = np.concatenate([pick_versions(step, 0, 16, views, view_chance=0.75) for step in range(1000)])
    fractions = np.bincount(picked, minlength=2 + 2 * views) / len(picked)
    # 1/4 for the photo and its mirror image, and 3/4 for the three augmented crops and their mirror images
    expected = [0.125] * 8 if views else [0.5] * 2
    assert np.allclose(fractions, expected, atol=0.01)
    assert np.array_equal(picked[16:32], pick_versions(1, 0, 16, views, view_chance=0.75)), (
        "the same step picks the same versions again"
    )
    assert not np.array_equal(picked[16:32], picked[32:48])


def test_other_weights_or_sizes_use_another_cache(vae, pixels, raw_photos, monkeypatch):
    cache_moments(vae, pixels, torch.device("cpu"))
    encoded = []
    original = versions.cached_array
    monkeypatch.setattr(
        versions, "cached_array", lambda *a: original(*a[:3], lambda photos: encoded.append(1) or a[3](photos), *a[4:])
    )
    cache_moments(vae, pixels, torch.device("cpu"))
    assert not encoded, "the same request must be read from the cache"
    other_vae = build_vae("tiny", (32, 32), latent_dim=4).eval()
    assert weights_key(other_vae) != weights_key(vae)
    cache_moments(other_vae, pixels, torch.device("cpu"))
    assert encoded
    encoded.clear()
    _, pixels_of_other_size = cache_pixels(load_photos(raw_photos), (64, 64))
    cache_moments(vae, pixels_of_other_size["train"], torch.device("cpu"))
    assert encoded


def test_the_measured_scale_is_that_of_sampled_latents(vae, pixels):
    moments = cache_moments(vae, pixels, torch.device("cpu"))
    mean, std, _ = measure_latents(moments)
    generator = torch.Generator().manual_seed(0)
    repeated = torch.from_numpy(np.concatenate([moments] * 200)).flatten(0, 1)
    latents = sample_posterior(repeated, torch.randn(len(repeated), 4, 8, 8, generator=generator))
    assert torch.allclose(latents.mean((0, 2, 3)), torch.tensor(mean), atol=0.02)
    assert torch.allclose(latents.std((0, 2, 3)), torch.tensor(std), rtol=0.03)


@pytest.mark.parametrize(
    "config",
    [
        {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 1.0, 2.0, 4.0], "scaling_factor": 1.0},
        {"latents_mean": None, "latents_std": None, "scaling_factor": 0.18215, "shift_factor": 0.3},
        {"latents_mean": None, "latents_std": None, "scaling_factor": 0.5, "shift_factor": None},
    ],
)
def test_the_pipeline_inverts_the_scale_of_training(vae, config):
    vae = AutoencoderKL.from_config(vae.config).eval()
    vae.register_to_config(**config)
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        decoded = CorelPipeline.decode(CorelPipeline(vae, torch.nn.Identity(), None), scale_latents(latents, vae), "pt")
    assert torch.allclose(decoded, expected, atol=1e-5)


def test_the_error_for_a_missing_or_unfinished_vae_says_what_to_do(tmp_path, vae):
    with pytest.raises(UserError, match="--vae-checkpoint .* train it first"):
        load_vae(tmp_path)
    vae.save_pretrained(tmp_path)
    assert load_vae(tmp_path).config.latents_mean is None, "a VAE from another project has no latents_mean"
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="not finished: continue it with train_vae.py --resume latest"):
        load_vae(tmp_path)


def test_another_config_or_another_arithmetic_uses_another_cache(vae, pixels, monkeypatch, tmp_path):

    other_vae = AutoencoderKL.from_config(dict(vae.config) | {"act_fn": "relu"}).eval()
    other_vae.load_state_dict(vae.state_dict())
    assert weights_key(other_vae) == weights_key(vae)
    first, second = (np.asarray(cache_moments(model, pixels, torch.device("cpu"))) for model in (vae, other_vae))
    assert not np.allclose(first, second)
    scaled = AutoencoderKL.from_config(dict(vae.config) | {"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4})
    assert config_key(scaled) == config_key(vae), "the cache holds latents before scaling"
    fresh = AutoencoderKL()
    fresh.save_pretrained(tmp_path)
    assert config_key(AutoencoderKL.from_pretrained(tmp_path)) == config_key(fresh), "tuples become lists"
    folder = cache_moments(vae, pixels, torch.device("cpu")).folder
    monkeypatch.setattr(versions, "arithmetic", lambda device: "sm90-tf32")
    assert cache_moments(vae, pixels, torch.device("cpu")).folder != folder
