"""The guide's troubleshooting cases, from runs that have the trouble."""

import json

import pytest
from conftest import run_here
from scipy.stats import binom

from corel_diffusers.advice import on_copies, on_kl, on_loss
from corel_diffusers.arguments import VAEArguments

COLLAPSED = ["--kl-weight", 1.0, "--kl-warmup", 0, "--reconstruction", "mse", "--no-perceptual", "--lr", 3e-3, "--epochs", 40]


def test_the_guides_own_kl_weight_collapses_the_posterior_and_is_told_so(vae_flags, tmp_path, capsys):
    run_here("train_vae", [*vae_flags, *COLLAPSED, "--output-dir", tmp_path])
    said = [line for line in capsys.readouterr().out.splitlines() if "KL is too low" in line]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(said) == 1
    assert f"KL {last['val_kl']:.0f} nats a photo" in said[0], "the line gives what was measured"
    assert "lower --kl-weight (was 1; 0.4 over the number of pixels suits most)" in said[0]


def test_a_learning_rate_of_nothing_is_told_that_the_loss_does_not_fall(vae_flags, tmp_path, capsys):
    flags = ["--lr", 1e-12, "--lr-min", 0, "--no-perceptual", "--epochs", 6, "--output-dir", tmp_path]
    run_here("train_vae", [*vae_flags, *flags])
    assert "the loss is not falling" in capsys.readouterr().out


def record(**values):
    return {"kl_weight": 1e-6, "val_psnr": 20.0, "val_kl": 2000.0} | values


@pytest.mark.parametrize(
    ("history", "args", "expected"),
    [
        ([record()], VAEArguments(kl_weight=1e-6), None),
        ([record(val_kl=9000.0)], VAEArguments(kl_weight=1e-6), "too high, 17.6 nats a latent value"),
        ([record(val_kl=400.0)], VAEArguments(kl_target=100.0), "not at its target of 100"),
        ([record(val_kl=105.0)], VAEArguments(kl_target=100.0), None),
        ([record(val_kl=7.0, val_psnr=10.2)], VAEArguments(kl_target=7.0), "raise --kl-target"),
    ],
)
def test_kl_lines(history, args, expected):
    lines = on_kl(history, args, (8, 8, 8), mean_picture_psnr=10.0)
    assert (expected is None and not lines) or expected in lines[0]


def test_loss_lines():
    def told(values):
        return on_loss([{"loss": value, "epoch": n + 1} for n, value in enumerate(values)], "loss", VAEArguments(learning_rate=1e-3))

    assert told([1.0 - 0.05 * n for n in range(10)]) == []
    assert "train longer (--epochs 20) or try --lr 0.002" in told([1.0 - 0.001 * n for n in range(10)])[0]
    assert "too high: try --lr 0.0005" in told([1.0 + 0.1 * n for n in range(10)])[0]
    assert told([1.0, 1.0]) == [], "two epochs tell nothing"


def copies_found(pictures, held_out, **more):
    """An evaluation that found so many copies in features, of 300 pictures and of 50 held-out photos."""
    shares = {"pictures": {"pixels": 0.0, "features": pictures / 300}}
    shares |= {} if held_out is None else {"held_out": {"pixels": 0.0, "features": held_out / 50}}
    return {"copies": shares | {"n": {"pictures": 300, "held_out": 50}}} | more


@pytest.mark.parametrize(
    ("pictures", "held_out", "more", "expected"),
    [
        (9, 1, {}, None),
        (0, 1, {}, None),
        (60, None, {}, None),
        (33, 0, {}, "11.0% of the pictures count as copies in features, of held-out photos 0.0%: train for less time"),
        (60, 1, {"guide": True, "guidance_scale": 2.5}, "--guidance-scale 1.5 makes fewer"),
        (60, 1, {"guide": True, "guidance_scale": 1.5}, "train for less time"),
    ],
)
def test_copies_line(pictures, held_out, more, expected):
    lines = on_copies(copies_found(pictures, held_out, **more))
    assert lines == [] if expected is None else len(lines) == 1 and expected in lines[0]


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
def test_without_copies_the_notice_of_copies_is_rare(share):
    """The chance of a notice where pictures count as copies as often as held-out photos do, by the binomial counts of both."""
    chance = 0.0
    for held_out in range(12):
        for pictures in range(45):
            if on_copies(copies_found(pictures, held_out)):
                chance += binom.pmf(pictures, 300, share) * binom.pmf(held_out, 50, share)
    assert chance < 0.025
