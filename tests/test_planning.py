"""The plan depends on the photos, the speed of the machine and the available time."""

import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import native_side_px
from corel_diffusers.files import write_json
from corel_diffusers.models.vae import build_vae
from corel_diffusers.runtime.timing import photos_per_second
from corel_diffusers.training import planning
from corel_diffusers.training.planning import NUM_CROPS, choose_settings
from corel_diffusers.training.presets import UNET_PRESETS, VAE_PRESETS

LONG = {"perceptual_weight": 1.0, "adversarial_weight": 0.3, "kl_weight": 0.2 / 64**2}
DECIDED = {"mixed_precision": "no", "attention": "fused"}  # the values on a machine without bf16 in hardware
# photos per second; the GPU is similar to an H200
LAPTOP, GPU = {"tiny": 20.0, "base": 1.0, "large": 0.01}, {"tiny": 300.0, "base": 256.0, "large": 54.0}


def with_device(machine: dict) -> SimpleNamespace:
    """Return a stand-in for an accelerator, with the attributes that planning reads."""
    return SimpleNamespace(device=torch.device("cuda" if machine is GPU else "cpu"), num_processes=1, print=print)


@pytest.mark.parametrize(
    ("machine", "count", "side_px", "flags", "expected"),
    [
        (LAPTOP, 350, 400, {}, {"config": "tiny", "image_size": "64", "batch_size": 2, "max_train_minutes": 20}),
        (LAPTOP, 350, 400, {"max_train_minutes": 720}, {"config": "base", "image_size": "128", "batch_size": 16}),
        (LAPTOP, 350, 100, {"max_train_minutes": 600}, {"config": "tiny", "image_size": "64", "batch_size": 2, **LONG}),
        (LAPTOP, 350, 400, {"epochs": 2}, {"config": "tiny", "image_size": "64", "batch_size": 2}),
        (LAPTOP, 350, 400, {"config": "base", "epochs": 2}, {"image_size": "128", "batch_size": 16}),
        (GPU, 350, 400, {}, {"config": "base", "image_size": "128", "batch_size": 16, "max_train_minutes": 20}),
        (GPU, 350, 400, {"image_size": "96", "batch_size": 4}, {"config": "base", "max_train_minutes": 20}),
        (GPU, 350, 400, {"max_train_minutes": 2}, {"config": "tiny", "image_size": "64", "batch_size": 16}),
        (GPU, 350, 400, {"epochs": 50}, {"config": "tiny", "image_size": "64", "batch_size": 2}),
        (GPU, 350, 400, {"max_train_steps": 100}, {"config": "tiny", "image_size": "64", "batch_size": 16}),
        (
            GPU,
            350,
            400,
            {"config": "tiny", "image_size": "64", "kl_weight": 1e-6},
            {"batch_size": 16, "max_train_minutes": 20, "perceptual_weight": 1.0, "adversarial_weight": 0.3},
        ),
        (
            GPU,
            350,
            400,
            {"config": "tiny", "image_size": "64", "kl_weight": 1e-6, "compile": True},
            {"batch_size": 16, "max_train_minutes": 20, "perceptual_weight": 1.0, "adversarial_weight": 0.3},
        ),
        (GPU, 350, 400, {"max_train_minutes": 600}, {"config": "base", "image_size": "128", "batch_size": 16}),
        (GPU, 10_000, 400, {"max_train_minutes": 600}, {"config": "large", "image_size": "256", "batch_size": 16}),
    ],
)
def test_the_largest_model_that_sees_enough_images_is_chosen(machine, count, side_px, flags, expected, monkeypatch):
    monkeypatch.setattr(planning, "native_side_px", lambda photos: side_px)
    monkeypatch.setattr(planning, "photos_per_second", lambda config, batch_size: machine[config])
    monkeypatch.setattr(planning, "device_name", lambda accelerator: "a GPU")
    args = VAEArguments(**DECIDED, **flags)
    args = args.checked()
    plan = choose_settings(
        args,
        with_device(machine),
        {"train": range(count)},
        VAE_PRESETS,
        lambda config, size_px, batch_size, attention: config,
        args.size_px,
    )
    assert plan == expected
    args = args.resolved(plan)
    assert None not in args.planned.values()
    assert args.learning_rate == 1e-4


def test_a_preset_that_does_not_fit_is_not_chosen(monkeypatch, capsys):
    monkeypatch.setattr(planning, "native_side_px", lambda photos: 400)
    monkeypatch.setattr(planning, "photos_per_second", lambda config, batch_size: GPU[config])
    monkeypatch.setattr(planning, "device_name", lambda accelerator: "a GPU")

    def trial_step(config: str, size_px: tuple[int, int], batch_size: int, attention: str) -> str:
        if config == "base":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return config

    args = VAEArguments(**DECIDED, plan=True)
    assert (
        choose_settings(args, with_device(GPU), {"train": range(350)}, VAE_PRESETS, trial_step, None)["config"]
        == "tiny"
    )
    # "large" has no model of this size
    args = VAEArguments(**DECIDED, plan=True, image_size="100", max_train_minutes=600)
    build = lambda config, size_px, batch_size, attention: build_vae(config, size_px) and config  # noqa: E731
    assert (
        choose_settings(args, with_device(GPU), {"train": range(5_000)}, VAE_PRESETS, build, (100, 100))["config"]
        == "base"
    )
    assert (
        "trains on about 225 photos/s of 64x64 px: 20 minutes, 270,000 images seen in 16,875 steps"
        in capsys.readouterr().out
    )


def test_a_plan_for_given_epochs_says_how_long_they_take(monkeypatch, capsys):
    monkeypatch.setattr(planning, "native_side_px", lambda photos: 400)
    monkeypatch.setattr(planning, "photos_per_second", lambda config, batch_size: LAPTOP[config])
    choose_settings(
        VAEArguments(**DECIDED, plan=True, epochs=600),
        Accelerator(cpu=True),
        {"train": range(200)},
        VAE_PRESETS,
        lambda *what: what[0],
        None,
    )
    out = capsys.readouterr().out
    assert "plan: --config tiny --image-size 64 --batch-size 2" in out
    assert "133 minutes, 120,000 images seen in 60,000 steps, each of the 200 photos 600 times" in out


def test_the_unet_uses_the_image_size_of_its_vae(monkeypatch, trained_vae):
    monkeypatch.setattr(planning, "photos_per_second", lambda step, batch_size: 10.0)
    asked = []
    args = UNetArguments(**DECIDED, vae_checkpoint=str(trained_vae), plan=True)
    plan = choose_settings(
        args, Accelerator(cpu=True), {"train": range(9)}, UNET_PRESETS, lambda *what: asked.append(what), (32, 48)
    )
    assert plan == {"config": "tiny", "batch_size": 16, "views": NUM_CROPS, "max_train_minutes": 40}
    assert asked == [("tiny", (32, 48), 16, "fused")]


@pytest.mark.parametrize(
    ("count", "flags", "expected"),
    [
        (79, {}, NUM_CROPS),
        (81, {}, 0),
        (79, {"epochs": 300}, 0),
        (79, {"epochs": 301}, NUM_CROPS),
        (79, {"views": 0}, None),
        (81, {"views": 2}, None),
    ],
)
def test_photos_that_are_seen_very_often_are_augmented(count, flags, expected, monkeypatch, trained_vae):
    monkeypatch.setattr(planning, "photos_per_second", lambda step, batch_size: 10.0)  # 24,000 images in 40 minutes
    args = UNetArguments(**DECIDED, vae_checkpoint=str(trained_vae), config="tiny", batch_size=16, **flags)
    plan = choose_settings(
        args, Accelerator(cpu=True), {"train": range(count)}, UNET_PRESETS, lambda *what: None, (32, 48)
    )
    assert plan.get("views") == expected
    args = args.resolved(plan)
    assert args.views == (flags.get("views") if expected is None else expected)


def test_speed_and_photo_size_are_measured(raw_photos):
    assert 50 < photos_per_second(lambda: time.sleep(0.1), batch_size=8, seconds=0.5) < 81
    assert native_side_px(load_photos(raw_photos)) == 48


@pytest.mark.parametrize(
    ("flags", "milliseconds", "expected"),
    [
        ({}, {("bf16", "fused"): 650, ("bf16", "math"): 451, ("no", "fused"): 673}, ("bf16", "math")),
        ({}, {("bf16", "fused"): 100, ("bf16", "math"): 103, ("no", "fused"): 93}, ("no", "fused")),
        ({"mixed_precision": "bf16"}, {("bf16", "fused"): 100, ("bf16", "math"): 97}, ("bf16", "fused")),
        ({"attention": "math"}, {("bf16", "math"): 103, ("no", "math"): 86}, ("no", "math")),
    ],
)
def test_the_fastest_precision_and_attention_are_chosen(flags, milliseconds, expected, monkeypatch, capsys):
    monkeypatch.setattr(planning, "set_precision", lambda accelerator, precision: precisions.append(precision))
    monkeypatch.setattr(planning, "photos_per_second", lambda step, batch_size: 1e3 * batch_size / milliseconds[step])
    precisions, used = [], []
    args = UNetArguments(config="tiny", batch_size=16, epochs=1, **flags)

    def trial_step(attention: str) -> tuple[str, str]:
        used.append((precisions[-1], attention))
        return used[-1]

    rate, *found = planning.fastest_precision(args, Accelerator(cpu=True), trial_step, args.batch_size)
    assert tuple(found) == expected
    assert rate == 1e3 * 16 / milliseconds[expected]
    assert set(used) == set(milliseconds), "each allowed combination is timed, and no other one"
    name = "float32" if expected[0] == "no" else expected[0]
    assert f"{name} with {expected[1]} attention {milliseconds[expected]}" in capsys.readouterr().out


def test_a_plan_uses_the_speed_of_the_fastest_precision(monkeypatch):
    monkeypatch.setattr(planning, "native_side_px", lambda photos: 400)
    monkeypatch.setattr(planning, "set_precision", lambda accelerator, precision: precisions.append(precision))
    speeds = {("bf16", "fused"): 100.0, ("bf16", "math"): 150.0, ("no", "fused"): 90.0}
    monkeypatch.setattr(planning, "photos_per_second", lambda attention, batch_size: speeds[precisions[-1], attention])
    precisions, args = [], UNetArguments()
    plan = choose_settings(
        args, Accelerator(cpu=True), {"train": range(350)}, UNET_PRESETS, lambda *what: what[-1], (64, 64)
    )
    assert (plan["config"], plan["mixed_precision"], plan["attention"]) == ("base", "bf16", "math")
    assert 60 * 40 * 90 < planning.CPU_SLOWDOWN * 100_000 < 60 * 40 * 150, (
        "with the other combinations, base would be too slow"
    )


def test_a_resumed_run_keeps_its_precision_and_attention(tmp_path):
    args = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny", batch_size=4, views=0, epochs=1)
    write_json(tmp_path / "run.json", {"plan": {"mixed_precision": "no", "attention": "math"}})
    args = planning.plan_run(args, Accelerator(cpu=True), {}, UNET_PRESETS, None, (64, 64))
    assert (args.mixed_precision, args.attention) == ("no", "math")
