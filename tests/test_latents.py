"""The cache of posteriors against the VAE itself, and the one source of scale."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_large_pixels, cache_pixels, random_views
from corel_diffusers.data.views import CHANGES, Views, pick_versions
from corel_diffusers.files import UserError
from corel_diffusers.latents import cache_moments, config_key, draw, load_vae, measure_scale, scale, weights_key
from corel_diffusers.models import build_vae
from pipeline import CorelPipeline


@pytest.fixture(scope="module")
def pixels(raw_photos):
    return cache_pixels(load_photos(raw_photos), (32, 32))[1]["train"]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae("tiny", (32, 32), latent_dim=4).eval()


def test_cached_moments_are_what_encoding_gives(vae, pixels):
    moments = cache_moments(vae, pixels, torch.device("cpu"))
    photos = pixels.batch(slice(None))
    for mirrored, pictures in enumerate((photos, photos.flip(-1))):
        with torch.no_grad():
            posterior = vae.encode(pictures).latent_dist
        assert np.allclose(moments[:, mirrored, :4], posterior.mean, atol=1e-5)
        assert np.allclose(moments[:, mirrored, 4:], posterior.logvar, atol=1e-5)


def test_a_draw_is_the_posteriors_own_sample(vae, pixels):
    moments = torch.from_numpy(np.array(cache_moments(vae, pixels, torch.device("cpu"))))
    mirrored = torch.arange(len(moments)) % 2 == 0
    with torch.no_grad():
        photos = pixels.batch(slice(None))
        posterior = vae.encode(torch.where(mirrored.view(-1, 1, 1, 1), photos.flip(-1), photos)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = posterior.sample(generator=torch.Generator().manual_seed(3))
    assert torch.allclose(draw(moments[torch.arange(len(moments)), mirrored.long()], noise), expected, atol=1e-5)


def test_views_are_encoded_as_they_were_changed_and_told_so(vae, pixels, raw_photos):
    large = cache_large_pixels(load_photos(raw_photos), (32, 32))
    assert large.values.shape[1:3] == (48, 48), "photos of 48 px have no more"
    views = Views.of(large, 3, 32)
    moments, changes = cache_moments(vae, pixels, torch.device("cpu"), views=views), views.changes()
    assert np.array_equal(moments[:, :2], cache_moments(vae, pixels, torch.device("cpu"))), "photo and mirror image first"
    assert moments.shape[1] == changes.shape[1] == 2 + 2 * 3
    assert changes.shape[2] == CHANGES
    whole = [torch.from_numpy(np.array(part.values)) for part in (large, pixels)]
    for view in range(3):
        seen = random_views(*whole, torch.ones(len(pixels), dtype=torch.bool), views.places[:, view], views.jitter[:, view])
        with torch.no_grad():
            mirrored = vae.encode(seen.flip(-1)).latent_dist.mean
        assert np.allclose(moments[:, 3 + 2 * view, :4], mirrored, atol=1e-4)
        straight, mirror = changes[:, 2 + 2 * view], changes[:, 3 + 2 * view]
        assert np.array_equal(straight * [1, 1, -1, 1, 1], mirror)
        assert np.allclose(straight[:, 3:], views.jitter[:, view])
    assert not changes[:, :2].any(), "a photo as it is has no changes"
    assert (changes[:, 2:, 0] > 0).all()
    assert (changes[:, 2:, 0] <= 0.5).all()


def test_photos_without_more_pixels_are_not_said_to_be_cropped(raw_photos):
    large = cache_large_pixels(load_photos(raw_photos), (48, 48))
    assert not Views.of(large, 3, 48).changes()[..., :3].any()


@pytest.mark.parametrize("views", [0, 3])
def test_versions_are_picked_as_often_as_they_are_said_to_be(views):
    picked = np.concatenate([pick_versions(step, 0, 16, views, view_chance=0.75) for step in range(1000)])
    shares = np.bincount(picked, minlength=2 + 2 * views) / len(picked)
    expected = [0.125] * 8 if views else [0.5] * 2  # photo and mirror image share a quarter, three views and theirs the rest
    assert np.allclose(shares, expected, atol=0.01)
    assert np.array_equal(picked[16:32], pick_versions(1, 0, 16, views, view_chance=0.75)), "the same step picks the same again"
    assert not np.array_equal(picked[16:32], picked[32:48])


def test_other_weights_photos_or_sizes_are_another_cache(vae, pixels, raw_photos, monkeypatch):
    from corel_diffusers.data import views

    cache_moments(vae, pixels, torch.device("cpu"))
    encoded = []
    original = views.cached_array
    monkeypatch.setattr(views, "cached_array", lambda *a: original(*a[:3], lambda photos: encoded.append(1) or a[3](photos), *a[4:]))
    cache_moments(vae, pixels, torch.device("cpu"))
    assert not encoded, "the same again is found"
    other = build_vae("tiny", (32, 32), latent_dim=4).eval()
    assert weights_key(other) != weights_key(vae)
    cache_moments(other, pixels, torch.device("cpu"))
    assert encoded
    encoded.clear()
    _, of_other_size = cache_pixels(load_photos(raw_photos), (64, 64))
    cache_moments(vae, of_other_size["train"], torch.device("cpu"))
    assert encoded


def test_measured_scale_makes_drawn_latents_standard(vae, pixels):
    moments = cache_moments(vae, pixels, torch.device("cpu"))
    mean, std = measure_scale(moments)
    generator = torch.Generator().manual_seed(0)
    many = torch.from_numpy(np.concatenate([moments] * 200)).flatten(0, 1)
    latents = draw(many, torch.randn(len(many), 4, 8, 8, generator=generator))
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
def test_the_pipeline_undoes_the_trainers_scale(vae, config):
    vae = AutoencoderKL.from_config(vae.config).eval()
    vae.register_to_config(**config)
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        decoded = CorelPipeline.decode(CorelPipeline(vae, torch.nn.Identity(), None), scale(latents, vae), "pt")
    assert torch.allclose(decoded, expected, atol=1e-5)


def test_a_missing_or_unfinished_vae_names_the_way_out(tmp_path, vae):
    with pytest.raises(UserError, match="--vae-checkpoint .* train it first"):
        load_vae(tmp_path)
    vae.save_pretrained(tmp_path)
    assert load_vae(tmp_path).config.latents_mean is None, "somebody else's VAE is used by its scaling_factor"
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="not finished: go on with train_vae.py --resume latest"):
        load_vae(tmp_path)


def test_another_config_of_the_same_weights_and_another_arithmetic_are_another_cache(vae, pixels, monkeypatch, tmp_path):
    from corel_diffusers.data import views

    other = AutoencoderKL.from_config(dict(vae.config) | {"act_fn": "relu"}).eval()
    other.load_state_dict(vae.state_dict())
    assert weights_key(other) == weights_key(vae)
    first, second = (np.asarray(cache_moments(model, pixels, torch.device("cpu"))) for model in (vae, other))
    assert not np.allclose(first, second)
    scaled = AutoencoderKL.from_config(dict(vae.config) | {"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4})
    assert config_key(scaled) == config_key(vae), "the scale comes after the cache"
    fresh = AutoencoderKL()
    fresh.save_pretrained(tmp_path)
    assert config_key(AutoencoderKL.from_pretrained(tmp_path)) == config_key(fresh), "tuples become lists"
    folder = cache_moments(vae, pixels, torch.device("cpu")).folder
    monkeypatch.setattr(views, "arithmetic", lambda device: "sm90-tf32")
    assert cache_moments(vae, pixels, torch.device("cpu")).folder != folder
