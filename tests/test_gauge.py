"""The overfitting gauge: the photos, the noise and the ratio of the losses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.losses.diffusion import Diffusion
from corel_diffusers.training import gauge


def test_the_gauge_is_held_out_loss_divided_by_seen_loss_at_the_same_noise():
    """For a model that always predicts 0, the loss is the mean square of the target, here the velocity."""
    config = SimpleNamespace(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    vae = SimpleNamespace(config=config, device=torch.device("cpu"))
    diffusion = Diffusion.of(UNetArguments())
    moments = [np.random.default_rng(seed).normal(0, 1 + seed, (8, 8, 4, 4)).astype(np.float32) for seed in range(2)]
    seen, held_out = (gauge.fixed_noise_set(vae, part, None, 16, diffusion) for part in moments)
    assert torch.equal(seen.noise, held_out.noise)
    assert torch.equal(seen.timesteps, held_out.timesteps)
    assert seen.timesteps.sort().values.diff().max() <= 1000 / len(seen.timesteps) + 1, (
        "the timesteps are evenly spaced over all noise levels"
    )

    values = gauge.overfitting_gauge(
        lambda noisy_latents, *_: SimpleNamespace(sample=torch.zeros_like(noisy_latents)), diffusion, [seen], [held_out]
    )
    alphas_cumprod = diffusion.scheduler.alphas_cumprod[seen.timesteps].view(-1, 1, 1, 1)
    squares = [
        (alphas_cumprod.sqrt() * seen.noise - (1 - alphas_cumprod).sqrt() * fixed_set.latents).square().mean((1, 2, 3))
        for fixed_set in (seen, held_out)
    ]
    assert values["gauge"] == pytest.approx(float(squares[1].mean() / squares[0].mean()), rel=1e-4)
    for band in range(4):
        rows = (seen.timesteps >= 250 * band) & (seen.timesteps < 250 * (band + 1))
        assert values[f"gauge_{band + 1}"] == pytest.approx(
            float(squares[1][rows].mean() / squares[0][rows].mean()), rel=1e-4
        )


def test_the_gauge_compares_equal_numbers_of_photos_per_class():
    train, wanted = np.array([0] * 6 + [1] * 2 + [2]), np.array([0, 0, 0, 1, 1, 1])
    assert gauge.matching_photos(train, wanted).tolist() == [0, 2, 5, 6, 6, 7], (
        "photos are repeated if a class has too few"
    )
    assert len(gauge.matching_photos(np.array([2]), wanted)) == len(wanted), (
        "photos of another class are used if a class has none"
    )


def test_the_minimum_of_the_gauge_ignores_the_first_validations():
    history = [{"val_loss": loss, "gauge": gauge} for loss, gauge in ((0.9, 0.8), (0.72, 1.0), (0.7, 1.1), (0.75, 1.2))]
    assert gauge.lowest_gauge(history) == 1.0
    assert gauge.lowest_gauge(history[:1]) == 0.8


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(TypeError, match="labels must be integers"):
        gauge.matching_photos(np.array([0.2, 0.5]), np.array([0.3]))
