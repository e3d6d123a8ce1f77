"""Runs with a known problem give the advice for it."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run_here
from scipy.stats import binom

from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.latents import measure_latents
from corel_diffusers.evaluation.report import on_copies
from corel_diffusers.files import UserError
from corel_diffusers.training.advice import on_channels, on_kl, on_loss, on_scale

COLLAPSED = [
    "--kl-weight",
    1.0,
    "--kl-warmup",
    0,
    "--reconstruction",
    "mse",
    "--no-perceptual",
    "--lr",
    3e-3,
    "--epochs",
    40,
]


def test_a_kl_weight_of_one_collapses_the_posterior_and_gives_advice(vae_flags, tmp_path, capsys):
    run_here("train_vae", [*vae_flags, *COLLAPSED, "--output-dir", tmp_path])
    advice = [line for line in capsys.readouterr().out.splitlines() if "KL is too low" in line]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(advice) == 1
    assert f"KL {last['val_kl']:.0f} nats per photo" in advice[0], "the advice contains the measured value"
    assert "lower --kl-weight (was 1; 0.4 / number of pixels is usually good)" in advice[0]


def test_a_learning_rate_of_almost_zero_gives_advice_about_the_loss(vae_flags, tmp_path, capsys):
    flags = ["--lr", 1e-12, "--lr-min", 0, "--no-perceptual", "--epochs", 6, "--output-dir", tmp_path]
    run_here("train_vae", [*vae_flags, *flags])
    assert "the loss is not falling" in capsys.readouterr().out


def record(**values):
    return {"kl_weight": 1e-6, "val_psnr": 20.0, "val_kl": 2000.0} | values


@pytest.mark.parametrize(
    ("history", "args", "expected"),
    [
        ([record()], VAEArguments(kl_weight=1e-6), None),
        ([record(val_kl=9000.0)], VAEArguments(kl_weight=1e-6), "too high: 17.6 nats per latent value"),
        ([record(val_kl=400.0)], VAEArguments(kl_target=100.0), "not at its target of 100"),
        ([record(val_kl=105.0)], VAEArguments(kl_target=100.0), None),
        ([record(val_kl=7.0, val_psnr=10.2)], VAEArguments(kl_target=7.0), "raise --kl-target"),
    ],
)
def test_advice_about_the_kl(history, args, expected):
    lines = on_kl(history, args, (8, 8, 8), mean_photo_psnr=10.0)
    assert not lines if expected is None else expected in lines[0]


def test_advice_about_the_loss():
    def advice(values, warmup_steps=30):
        history = [{"loss": value, "epoch": n + 1, "step": 14 * (n + 1)} for n, value in enumerate(values)]
        return on_loss(history, "loss", VAEArguments(learning_rate=1e-3, lr_warmup_steps=warmup_steps))

    assert advice([1.0 - 0.05 * n for n in range(10)]) == []
    assert "train longer (--epochs 20) or try --lr 0.002" in advice([1.0 - 0.001 * n for n in range(10)])[0]
    assert "too high: try --lr 0.0005" in advice([1.0 + 0.1 * n for n in range(10)])[0]
    assert "still rises: give fewer than --lr-warmup-steps 500" in advice([1.0 - 0.001 * n for n in range(10)], 500)[0]
    assert advice([1.0, 1.0]) == [], "two epochs are not enough"


def evaluation_with_copies(samples, held_out, **more):
    """Return an evaluation with these numbers of copies in features, among 300 samples and 50 held-out photos."""
    fractions = {"pictures": {"pixels": 0.0, "features": samples / 300}}
    fractions |= {} if held_out is None else {"held_out": {"pixels": 0.0, "features": held_out / 50}}
    return {"copies": fractions | {"n": {"pictures": 300, "held_out": 50}}} | more


@pytest.mark.parametrize(
    ("samples", "held_out", "more", "expected"),
    [
        (9, 1, {}, None),
        (0, 1, {}, None),
        (60, None, {}, None),
        (
            33,
            0,
            {},
            "11.0% of the samples count as copies in features, but only 0.0% of the held-out photos: "
            "train for less time",
        ),
        (60, 1, {"guide": True, "guidance_scale": 2.5}, "try --guidance-scale 1.5"),
        (60, 1, {"guide": True, "guidance_scale": 1.5}, "train for less time"),
    ],
)
def test_advice_about_copies(samples, held_out, more, expected):
    lines = on_copies(evaluation_with_copies(samples, held_out, **more))
    assert lines == [] if expected is None else len(lines) == 1 and expected in lines[0]


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05])
def test_advice_about_copies_is_rare_without_copies(rate):
    """If samples and held-out photos count as copies at the same rate, advice has a probability below 2.5 %.

    Both counts are binomial.
    """
    probability = 0.0
    for held_out in range(12):
        for samples in range(45):
            if on_copies(evaluation_with_copies(samples, held_out)):
                probability += binom.pmf(samples, 300, rate) * binom.pmf(held_out, 50, rate)
    assert probability < 0.025


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, None),
        ({"scaling_factor": 0.2}, "a standard deviation of 0.19"),
        ({"scaling_factor": 1e-9}, UserError),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 1e9]}, UserError),
    ],
)
def test_advice_about_the_scale_of_latents(entries, expected):
    """The reference is standard normal latents: as posterior means without noise, in the four channels of a VAE."""
    vae = SimpleNamespace(config=SimpleNamespace(latents_std=None, scaling_factor=1.0, latent_channels=4))
    vars(vae.config).update(entries)
    moments = torch.randn(50, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    moments[:, :, 4:] = -100.0
    if expected is UserError:
        with pytest.raises(UserError, match="no UNet can learn them: correct scaling_factor or latents_std"):
            on_scale(vae, moments.numpy(), "vae_models")
    else:
        lines = on_scale(vae, moments.numpy(), "vae_models")
        assert lines == [] if expected is None else expected in lines[0]


def test_dead_channels_are_named():
    """The reference is torch's KL divergence of two normal distributions."""
    mean = torch.randn(20, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean[:, :, 1] = 0.0
    logvar = torch.full_like(mean, -2.0)
    logvar[:, :, 1] = 0.0
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean((0, 1, 3, 4))
    measured = measure_latents(torch.cat([mean, logvar], 2).numpy()).kl
    assert measured == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-9)
    (line,) = on_channels(measured)
    assert line.startswith("1 of the 3 latent channels carry almost no information (number 2): give --latent-dim 2")
    assert on_channels([1.0, 0.5]) == []
