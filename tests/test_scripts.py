"""The real scripts, launched at tiny size: what they leave behind, resume, refusals, several processes."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, UNET_CONFIG, launch, make_photos, run_here, script
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.files import UserError
from corel_diffusers.generate import pick_labels
from corel_diffusers.latents import cache_moments, measure_scale

SHORT = {"train_vae": ["--epochs", 4, "--checkpoint-every", 1], "train_unet": ["--epochs", 4, "--checkpoint-every", 1]}


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without the times, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(a: Path, b: Path, weights: str) -> None:
    """The same weights, bit by bit, in the model and in the last checkpoint, and the same metrics."""
    checkpoints = [sorted(p.name for p in (f / "checkpoints").iterdir())[-1] for f in (a, b)]
    assert checkpoints[0] == checkpoints[1]
    for name in (weights, f"checkpoints/{checkpoints[0]}/model.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert metrics(a) == metrics(b)
    steps = [line["step"] for line in metrics(a)]
    assert steps == sorted(set(steps))


def test_train_vae_leaves_what_the_guide_promises(trained_vae, raw_photos):
    vae = AutoencoderKL.from_pretrained(trained_vae)
    assert vae.config.sample_size == 32
    for name in ("training_losses.png", "reconstructions/epoch_0001.png", "samples/epoch_0002.png", "metrics.jsonl", "run.json"):
        assert (trained_vae / name).stat().st_size > 0, name
    assert Image.open(trained_vae / "reconstructions" / "epoch_0002.png").height >= 64
    lines = metrics(trained_vae)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "reconstruction", "perceptual", "kl", "val_psnr", "val_ssim", "val_kl", "images_seen"} <= set(lines[0])
    _, pixels = cache_pixels(load_photos(raw_photos), (32, 32))
    mean, std = measure_scale(cache_moments(vae.eval(), pixels["train"], torch.device("cpu")))
    assert np.allclose(vae.config.latents_mean, mean, atol=1e-5)
    assert np.allclose(vae.config.latents_std, std, rtol=1e-4)
    assert vae.config.scaling_factor == 1


def test_train_unet_leaves_a_pipeline_folder(trained_unet, trained_vae):
    for name in ("loss_history.png", "grid.png", "samples/epoch_0001.png", "README.md", "pipeline.py", "metrics.jsonl"):
        assert (trained_unet / name).stat().st_size > 0, name
    pipe = DiffusionPipeline.from_pretrained(trained_unet, trust_remote_code=True)
    assert pipe.scheduler.config.clip_sample is False
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    assert list(pipe.config.class_names.values()) == ["sunset at sea", "snowy mountain", "pine forest"]
    ours, theirs = load_file(trained_vae / "diffusion_pytorch_model.safetensors"), pipe.vae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "the VAE in the pipeline is the one it was trained with"
    assert pipe.vae.config.latents_mean == AutoencoderKL.from_pretrained(trained_vae).config.latents_mean


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_killed_at_any_moment_and_resumed_is_the_uninterrupted_run(name, vae_flags, unet_flags, tmp_path):
    """kill -9, no warning: gradient accumulation, EMA and the default learning rate schedule included."""
    flags = [*(vae_flags if name == "train_vae" else unet_flags), *SHORT[name], "--grad-accum", 2, "--output-dir"]
    script(name, *flags, tmp_path / "whole")
    words = [sys.executable, str(ROOT / f"{name}.py"), *map(str, flags), str(tmp_path / "cut")]
    running = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "checkpoints" / "step-000004").is_dir():
        time.sleep(0.01)
        assert running.poll() is None, "the run ended before it could be killed"
    running.kill()
    running.wait()
    done = script(name, *flags, tmp_path / "cut", "--resume", "latest")
    assert "resuming from" in done.stdout
    weights = {"train_vae": "diffusion_pytorch_model.safetensors", "train_unet": "unet/diffusion_pytorch_model.safetensors"}[name]
    assert_same_run(tmp_path / "whole", tmp_path / "cut", weights)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("train_unet", ["--lr-scheduler", "plateau"]),
        ("train_unet", ["--lr-scheduler", "cosine", "--no-ema"]),
        ("train_unet", ["--lr-scheduler", "linear", "--prediction-type", "epsilon", "--unconditional"]),
        ("train_unet", ["--lr-scheduler", "none", "--schedule", "cosine", "--num-workers", 1]),
        (
            "train_unet",
            ["--lr-scheduler", "constant_with_warmup", "--lr-warmup-steps", 3, "--mixed-precision", "bf16", "--attention", "math"],
        ),
        ("train_unet", ["--optimizer", "muon", "--timesteps", "log-normal", "--zero-terminal-snr", "--validate-every", 2]),
        ("train_unet", ["--views", 2, "--lr-scheduler", "cosine_warm_restarts"]),
        ("train_vae", ["--lr-scheduler", "cosine_warm_restarts", "--kl-target", 50, "--optimizer", "adamw"]),
        ("train_vae", ["--adversarial-weight", 0.5, "--crop-chance", 0.5]),
    ],
)
def test_stopped_in_mid_epoch_and_resumed_is_the_uninterrupted_run(name, extra, vae_flags, unet_flags, tmp_path, monkeypatch):
    """SIGTERM between two steps of an epoch: the running means must go on as well."""
    flags = [*(vae_flags if name == "train_vae" else unet_flags), *extra, "--batch-size", 2, "--epochs", 2, "--output-dir"]
    run_here(name, [*flags, tmp_path / "whole"])

    module = importlib.import_module(name)
    original = module.show_progress

    def interrupting(bar, plan, state, length, means, args):
        original(bar, plan, state, length, means, args)
        if state.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "show_progress", interrupting)
    with pytest.raises(SystemExit) as ended:
        run_here(name, [*flags, tmp_path / "cut"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "cut" / "checkpoints" / "step-000011").is_dir()
    monkeypatch.setattr(module, "show_progress", original)
    run_here(name, [*flags, tmp_path / "cut", "--resume", "latest"])
    weights = {"train_vae": "diffusion_pytorch_model.safetensors", "train_unet": "unet/diffusion_pytorch_model.safetensors"}[name]
    assert_same_run(tmp_path / "whole", tmp_path / "cut", weights)


def test_what_a_discriminator_has_shaped_is_published_though_its_loss_is_higher(vae_flags, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("train_vae")
    losses = iter((2.0, 1.0, 3.0, 4.0))  # the verdict counts from the third epoch on
    measured = module.validate
    monkeypatch.setattr(module, "validate", lambda *values: measured(*values) | {"val_loss": next(losses)})
    run_here("train_vae", [*vae_flags, "--epochs", 4, "--adversarial-weight", 0.5, "--adversarial-start", 0.5, "--output-dir", tmp_path])
    average = load_file(sorted((tmp_path / "checkpoints").iterdir())[-1] / "ema.safetensors")
    vae = AutoencoderKL.from_pretrained(tmp_path)
    assert all(torch.equal(value, average[str(place)]) for place, value in enumerate(vae.parameters()))
    assert "the VAE of epoch 4" in capsys.readouterr().out


def test_each_backward_pass_of_the_adversarial_loop_reaches_its_own_side_only(vae_flags, tmp_path, monkeypatch):
    module, sides, passes = importlib.import_module("train_vae"), {}, []

    def kept(side, build):
        def wrapped(*values):
            sides[side] = build(*values)
            return sides[side]

        return wrapped

    def gradients(side):
        return [None if p.grad is None else p.grad.clone() for p in sides[side].parameters()]

    def changed(before, after):
        pairs = zip(before, after, strict=True)
        return any((a is None) != (b is None) or (a is not None and not torch.equal(a, b)) for a, b in pairs)

    original = Accelerator.backward

    def backward(self, loss, **more):
        before = {side: gradients(side) for side in sides}
        original(self, loss, **more)
        passes.append({side for side in sides if changed(before[side], gradients(side))})

    monkeypatch.setattr(module, "VAEWithPosterior", kept("vae", module.VAEWithPosterior))
    monkeypatch.setattr(module, "build_discriminator", kept("discriminator", module.build_discriminator))
    monkeypatch.setattr(Accelerator, "backward", backward)
    flags = ["--adversarial-weight", 0.5, "--adversarial-start", 0, "--max-train-steps", 3, "--output-dir", tmp_path]
    monkeypatch.setattr(module, "validate", lambda *values: {"val_loss": 1.0, "val_psnr": 1.0, "val_ssim": 1.0, "val_kl": 1.0})
    run_here("train_vae", [*vae_flags, *flags])
    assert passes == 3 * [{"vae"}, {"discriminator"}]


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_minutes_end_on_time_with_the_learning_rate_at_its_lowest(name, vae_flags, unet_flags, tmp_path, monkeypatch):
    flags = vae_flags if name == "train_vae" else unet_flags
    clock = itertools.count(step=0.25)  # a quarter of a second each time somebody looks: however busy the machine is
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run_here(name, [*flags, "--lr-scheduler", "cosine", "--lr", 1e-3, "--max-train-minutes", 0.2, "--output-dir", tmp_path])
    last = metrics(tmp_path)[-1]
    seconds = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    assert 12 <= seconds < 14
    assert last["learning_rate"] < 1e-4
    assert last["step"] > 5


def test_a_plan_is_printed_and_nothing_written(vae_flags, tmp_path, capsys):
    """And the plan is what a run without those flags takes, and what it is resumed with."""
    where = ["--data-dir", vae_flags[1], "--mixed-precision", "no", "--no-perceptual", "--output-dir", tmp_path]
    with pytest.raises(SystemExit) as ended:
        run_here("train_vae", [*where, "--plan"])
    assert not ended.value.code
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert re.search(r"plan: --config tiny --image-size 64 --batch-size 2 .*--max-train-minutes 20", out)
    photos, seen, steps = (int(re.search(rf"([\d,]+) {word}", out)[1].replace(",", "")) for word in ("photos/s", "pictures", "steps"))
    assert seen == pytest.approx(20 * 60 * photos, rel=0.5)
    assert steps == pytest.approx(seen / 2, abs=1)
    run_here("train_vae", [*where, "--max-train-steps", 1])
    assert json.loads((tmp_path / "run.json").read_text())["plan"] == {
        "config": "tiny", "image_size": "64", "batch_size": 2, "max_train_steps": 1,
        "perceptual_weight": 0.3, "adversarial_weight": 0.0, "kl_weight": 0.4 / 64**2, "mixed_precision": "no", "attention": "fused",
    }  # fmt: skip
    run_here("train_vae", [*where, "--resume", "latest"])
    assert "plan: as the run was begun" in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["step"] == 1, "the length is remembered as well"
    run_here("train_vae", [*where, "--max-train-steps", 2, "--resume", "latest"])
    assert metrics(tmp_path)[-1]["step"] == 2


def test_samples_are_judged_while_the_unet_trains(unet_flags, raw_photos, tmp_path, capsys):
    four_held_out = make_photos(tmp_path / "photos", classes=4, each=4)
    flags = [four_held_out if flag == raw_photos else flag for flag in unet_flags]
    run_here("train_unet", [*flags, "--epochs", 2, "--validate-every", 1, "--evaluate-every", 2, "--output-dir", tmp_path])
    first, second = metrics(tmp_path)
    assert "kid_e3" not in first
    assert second["kid_e3"] > 0
    assert second["copies_pixels"] == 0
    for name in ("gauge", "gauge_1", "gauge_4", "seen_loss", "val_loss_2"):
        assert first[name] > 0
    assert first["gauge"] == pytest.approx(first["val_loss"] / first["seen_loss"], rel=1e-4)


def test_the_gauge_is_the_held_out_loss_over_the_seen_one_at_the_same_noise():
    """Of a model that always says 0, the loss is the target's own mean square, by the equation of the velocity."""
    module = importlib.import_module("train_unet")
    vae = SimpleNamespace(config=SimpleNamespace(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0))
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    moments = [np.random.default_rng(seed).normal(0, 1 + seed, (8, 8, 4, 4)).astype(np.float32) for seed in range(2)]
    seen, held_out = (module.fixed_draws(vae, values, None, scheduler, torch.device("cpu")) for values in moments)
    assert torch.equal(seen.noise, held_out.noise)
    assert torch.equal(seen.timesteps, held_out.timesteps)
    assert seen.timesteps.sort().values.diff().max() <= 1000 / len(seen.timesteps) + 1, "evenly over all noise levels"

    found = module.gauge(lambda noisy, *_: SimpleNamespace(sample=torch.zeros_like(noisy)), scheduler, seen, held_out)
    kept = scheduler.alphas_cumprod[seen.timesteps].view(-1, 1, 1, 1)
    squares = [(kept.sqrt() * seen.noise - (1 - kept).sqrt() * draws.latents).square().mean((1, 2, 3)) for draws in (seen, held_out)]
    assert found["gauge"] == pytest.approx(float(squares[1].mean() / squares[0].mean()), rel=1e-4)
    for band in range(4):
        rows = (seen.timesteps >= 250 * band) & (seen.timesteps < 250 * (band + 1))
        assert found[f"gauge_{band + 1}"] == pytest.approx(float(squares[1][rows].mean() / squares[0][rows].mean()), rel=1e-4)


def test_the_gauge_compares_as_many_photos_of_the_same_classes():
    module = importlib.import_module("train_unet")
    train, wanted = np.array([0] * 6 + [1] * 2 + [2]), np.array([0, 0, 0, 1, 1, 1])
    assert module.alike(train, wanted).tolist() == [0, 2, 5, 6, 6, 7], "again where a class has too few"
    assert len(module.alike(np.array([2]), wanted)) == len(wanted), "of another class where there is none"


def test_the_gauge_is_judged_from_its_lowest_value_once_the_model_has_learned():
    module = importlib.import_module("train_unet")
    history = [{"val_loss": loss, "gauge": gauge} for loss, gauge in ((0.9, 0.8), (0.72, 1.0), (0.7, 1.1), (0.75, 1.2))]
    assert module.healthy_gauge(history) == 1.0
    assert module.healthy_gauge(history[:1]) == 0.8


def test_the_gauge_rises_when_a_few_photos_are_learned_by_heart(unet_flags, tmp_path):
    flags = ["--max-train-samples", 3, "--epochs", 400, "--validate-every", 40, "--lr", 2e-3, "--early-stopping-patience", 0]
    run_here("train_unet", [*unet_flags, *flags, "--oscillation-window", 0, "--views", 0, "--output-dir", tmp_path])
    gauges = [line["gauge"] for line in metrics(tmp_path)]
    assert gauges[-1] > 1.3 * min(gauges[:3])


def test_accumulated_passes_are_the_larger_batch_within_rounding(vae_flags, tmp_path):
    common = [*vae_flags, "--max-train-steps", 3, "--lr", 1e-3, "--no-perceptual", "--output-dir"]
    run_here("train_vae", [*common, tmp_path / "one", "--batch-size", 4])
    run_here("train_vae", [*common, tmp_path / "two", "--batch-size", 2, "--grad-accum", 2])
    one, two = metrics(tmp_path / "one")[-1], metrics(tmp_path / "two")[-1]
    assert one["reconstruction"] == pytest.approx(two["reconstruction"], rel=1e-4)
    assert one["val_psnr"] == pytest.approx(two["val_psnr"], rel=1e-3)


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_two_processes_are_one_with_the_same_global_batch(name, vae_flags, unet_flags, configs, tmp_path):
    """DDP over gloo, as torchrun starts it on CPUs, resumed in between. Without dropout, which each process draws for itself."""
    config = configs / "without-dropout.json"
    config.write_text(json.dumps(UNET_CONFIG | {"dropout": 0.0}))
    extra = {  # the warm-up of the KL weight follows the run's length, and "two" is begun as a shorter one
        "train_vae": ["--no-perceptual", "--lr-scheduler", "none", "--kl-warmup", 0],
        "train_unet": ["--config", config, "--lr-scheduler", "plateau"],
    }[name]
    common = [*(vae_flags if name == "train_vae" else unet_flags), *extra, "--lr", 1e-3, "--output-dir"]
    port = {"train_vae": 29533, "train_unet": 29534}[name]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, ROOT / f"{name}.py"]
    processes = {"env": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}}
    run_here(name, [*common, tmp_path / "one", "--batch-size", 4, "--epochs", 2])
    launch(*torchrun, *common, tmp_path / "two", "--batch-size", 2, "--epochs", 1, **processes)
    launch(*torchrun, *common, tmp_path / "two", "--batch-size", 2, "--epochs", 2, "--resume", "latest", **processes)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["images_seen"] == b["images_seen"]
        for value in {"reconstruction", "kl", "val_psnr", "loss", "val_loss"} & set(a):
            if name == "train_unet" or value != "loss":
                assert a[value] == pytest.approx(b[value], rel=2e-3), value


def test_a_size_that_no_presets_unet_takes_is_told_before_the_vae_is_trained(vae_flags, tmp_path, capsys):
    run_here("train_vae", [*vae_flags, "--image-size", 40, "--max-train-steps", 1, "--output-dir", tmp_path])
    expected = "notice: --image-size 40: the presets' UNets, which halve the latents twice, can take multiples of 16 px: give 32 or 48, or"
    assert expected in capsys.readouterr().out


def test_accelerate_launch_and_the_guides_flags(unet_flags, tmp_path):
    flags = [
        "--output-dir", tmp_path, "--epochs", 1, "--grad-accum", 2, "--lr", "1e-4", "--image_size", 32, "--ema_decay", 0.995, "--schedule",
        "cosine", "--no-mixed-precision", "--lr-scheduler", "cosine_warm_restarts", "--lr-min", "1e-5", "--early-stopping-patience", 30,
        "--early-stopping-delta", "1e-5", "--oscillation-window", 10, "--oscillation-threshold", 0.0005, "--num-workers", 0,
    ]  # fmt: skip
    kept = [flag for flag in unet_flags if flag not in ("--mixed-precision", "no")]
    launch(sys.executable, "-m", "accelerate.commands.launch", "--cpu", ROOT / "train_unet.py", *kept, *flags)
    assert (tmp_path / "model_index.json").is_file()


def test_a_finished_run_goes_on_with_more_epochs_and_early_stopping_ends_one(unet_flags, tmp_path, capsys):
    flags = [*unet_flags, "--output-dir", tmp_path]
    run_here("train_unet", [*flags, "--epochs", 1])
    run_here("train_unet", [*flags, "--epochs", 2, "--resume", "latest"])
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2]
    capsys.readouterr()
    stopping = [
        *unet_flags,
        "--output-dir",
        tmp_path / "stopping",
        "--epochs",
        9,
        "--early-stopping-patience",
        2,
        "--early-stopping-delta",
        9,
    ]
    run_here("train_unet", stopping)
    assert len(metrics(tmp_path / "stopping")) == 3
    assert "no lower loss in 2 validations" in capsys.readouterr().out
    run_here("train_unet", [*stopping, "--resume", "latest", "--early-stopping-patience", 3])
    assert len(metrics(tmp_path / "stopping")) == 4, "more patience goes on"


def measure_losses(monkeypatch, held_out: list[float], seen: list[float]) -> None:
    """The UNet's validations find these."""
    losses = zip(held_out, seen, strict=True)

    def gauge(*_: object) -> dict[str, float]:
        val_loss, seen_loss = next(losses)
        return {"val_loss": val_loss, "seen_loss": seen_loss, "gauge": val_loss / seen_loss}

    module = importlib.import_module("train_unet")
    monkeypatch.setattr(module, "gauge", gauge)
    monkeypatch.setattr(module, "PUBLISHED_UP_TO", 1.075)


def test_early_stopping_waits_for_held_out_photos_only_once_the_gauge_has_risen(unet_flags, tmp_path, monkeypatch):
    measure_losses(monkeypatch, [1.0, 1.01, 1.03, 1.05, 1.04, 1.07, 1.08], [1.0, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93])
    flags = ["--epochs", 9, "--validate-every", 1, "--early-stopping-patience", 2, "--oscillation-window", 0]
    run_here("train_unet", [*unet_flags, *flags, "--output-dir", tmp_path])
    published = [line["published"] for line in metrics(tmp_path)]
    assert published[:4] == [1, 1, 1, 0], "up to the limit of the gauge"
    assert len(published) == 7, "the fifth falls, though the held-out loss was lower before the gauge rose; the last two do not"


def test_a_run_of_minutes_ends_when_it_learns_the_photos_by_heart_and_not_before(unet_flags, tmp_path, monkeypatch, capsys):
    measure_losses(monkeypatch, [1.0, 1.0, 1.0, 1.0, 1.1], [1.0, 1.0, 1.0, 1.0, 0.9])
    monkeypatch.setattr(importlib.import_module("train_unet"), "GIVEN_UP_AFTER", 0.0)
    flags = [*unet_flags, "--max-train-minutes", 5, "--validate-every", 1, "--output-dir", tmp_path]
    run_here("train_unet", flags)
    assert [line["published"] for line in metrics(tmp_path)] == [1, 1, 1, 1, 0], "no lower loss, but the gauge is healthy"
    assert "epoch 4 of 5 (it learns the photos by heart" in (said := capsys.readouterr().out)
    assert "--early-stopping-patience 0 goes on" in said
    run_here("train_unet", [*flags, "--resume", "latest"])
    assert len(metrics(tmp_path)) == 5, "it stays stopped"


def test_an_unfinished_vae_is_refused_by_the_script(vae_flags, unet_flags, tmp_path, monkeypatch):
    """Killed before the scale of the latents was measured: training on it would go on with a scale of 1."""
    module = importlib.import_module("train_vae")
    monkeypatch.setattr(module, "measure_scale", lambda moments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_here("train_vae", [*vae_flags, "--output-dir", tmp_path / "vae", "--max-train-steps", 1, "--no-perceptual"])
    with pytest.raises(UserError, match="its training is not finished"):
        run_here("train_unet", [*unet_flags, "--vae-checkpoint", tmp_path / "vae", "--output-dir", tmp_path / "unet"])
    assert not (tmp_path / "unet").exists()


def test_a_finished_run_without_checkpoints_is_not_begun_anew_over_its_model(unet_flags, tmp_path):
    run_here("train_unet", [*unet_flags, "--output-dir", tmp_path, "--max-train-steps", 1])
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="a finished run whose checkpoints are gone"):
        run_here("train_unet", [*unet_flags, "--output-dir", tmp_path, "--max-train-steps", 1, "--resume", "latest"])


def test_unlabelled_photos_make_an_unconditional_model(raw_photos, configs, trained_vae, tmp_path):
    flags = ["--image-dir", raw_photos, "--classes", "2", "--vae-checkpoint", trained_vae, "--config", configs / "unet.json"]
    run_here("train_unet", [*flags, "--output-dir", tmp_path, "--max-train-steps", 2, "--batch-size", 2])
    pipe = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert pipe.config.class_names is None
    assert len(pipe(1, num_inference_steps=2).images) == 1


def test_tensorboard_gets_the_metrics(vae_flags, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_here("train_vae", [*vae_flags, "--output-dir", tmp_path, "--max-train-steps", 2, "--report-to", "tensorboard", "--no-perceptual"])
    events = event_accumulator.EventAccumulator(str(next((tmp_path / "logs").rglob("events.*")).parent)).Reload()
    assert events.Scalars("val_psnr")[-1].value == pytest.approx(metrics(tmp_path)[-1]["val_psnr"], rel=1e-4)


REFUSED = [
    ("train_vae", ["--batch-size", 0], "--batch-size 0: give 1 or more"),
    ("train_vae", ["--image-size", "big"], "--image-size big: give pixels as 128, or as 96x144"),
    ("train_vae", ["--data-dir", "nowhere"], "--data-dir nowhere is no folder"),
    ("train_vae", ["--config", "huge"], "--config huge is unknown"),
    ("train_vae", ["--lr", "-1"], "--learning-rate -1.0: give a number above 0"),
    ("train_vae", ["--lr", "1e-6"], "--lr-min 1e-05: give at most --learning-rate"),
    ("train_unet", ["--vae-checkpoint", "nowhere"], "--vae-checkpoint nowhere is no folder: train with train_vae.py first"),
    ("train_unet", ["--vae-checkpoint", "vae_models/best_model.pt"], "--vae-checkpoint vae_models/best_model.pt is no folder: train with"),
    ("train_unet", ["--seed", -1], "--seed -1: give 0 or more"),
    ("train_unet", ["--push-to-hub"], "--push-to-hub needs --hub-model-id"),
    ("train_unet", ["--ema-decay", "1.5"], "--ema-decay 1.5"),
    ("train_vae", ["--adversarial-start", "1.5"], "--adversarial-start 1.5: give a share of the run from 0 to below 1"),
    ("train_unet", ["--epochs", 3, "--max-train-minutes", 1], "--epochs and --max-train-minutes exclude each other"),
]


@pytest.mark.parametrize(("name", "flags", "expected"), REFUSED)
def test_a_refused_flag_is_one_line_before_anything_heavy_is_imported_and_leaves_nothing(name, flags, expected, tmp_path):
    words = [sys.executable, "-X", "importtime", ROOT / f"{name}.py", *flags, "--output-dir", tmp_path / "out"]
    done = launch(*words, check=False)
    imported, said = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else said).append(line)
    assert done.returncode == 2
    assert len(said) == 1
    assert said[0].startswith(f"error: {expected}")
    assert not (tmp_path / "out").exists()
    assert {"json", "tyro"} < (names := {line.split("|")[-1].strip() for line in imported})
    assert not names & {"torch", "datasets", "diffusers", "accelerate", "transformers"}


def test_what_the_photos_or_the_run_refuse_is_said_before_anything_is_written(vae_flags, unet_flags, trained_vae, tmp_path):
    (tmp_path / "empty").mkdir()
    out = ["--output-dir", tmp_path / "a"]
    for name, flags, expected in (
        ("train_vae", ["--data-dir", tmp_path / "empty", *out], "No images found in"),
        ("train_vae", [*vae_flags, "--image-size", 30, *out], "--image-size 30: the VAE can take multiples of 4 px: give 28 or 32"),
        ("train_vae", [*vae_flags, "--output-dir", trained_vae / "run.json" / "a"], "run.json is a file, and no folder can be made there"),
        ("train_vae", [*vae_flags, "--output-dir", trained_vae], "already holds a run: give --resume latest"),
        ("train_vae", [*vae_flags, "--output-dir", trained_vae, "--resume", "latest", "--lr", 0.5], "learning-rate was 0.001, is 0.5"),
        ("train_unet", [*unet_flags, "--vae-checkpoint", tmp_path / "empty", *out], "no VAE can be loaded"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=re.escape(expected)) as error:
            run_here(name, flags)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_fp16_without_a_gpu_is_one_line_from_the_script(vae_flags, tmp_path):
    done = script("train_vae", *vae_flags, "--output-dir", tmp_path / "a", "--mixed-precision", "fp16", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --mixed-precision fp16 needs a GPU")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_out_of_memory_ends_in_one_line_with_the_flags_that_help(vae_flags, tmp_path):
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (9 << 30,) * 2); sys.argv = sys.argv[1:]"
    code = f"{limit}; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = [*vae_flags, "--batch-size", 16384, "--image-size", 64, "--output-dir", tmp_path / "out", "--max-train-steps", 1]
    done = launch(sys.executable, "-c", code, ROOT / "train_vae.py", *flags, check=False)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory with --batch-size 16384 at 64x64 px")
    assert "--batch-size 8192 --grad-accum 2" in last
    assert "--image-size" in last


@pytest.mark.gpu
def test_fp16_on_a_gpu(vae_flags, tmp_path):
    flags = [flag for flag in vae_flags if flag not in ("--mixed-precision", "no")]
    done = script("train_vae", *flags, "--output-dir", tmp_path, "--epochs", 2)
    assert "mixed precision fp16" in done.stdout
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_one_scale_of_the_losses_serves_both_sides_of_a_step(grad_accum, vae_flags, tmp_path, monkeypatch):
    """The scale would double after the VAE's part of a step: the discriminator's gradients have to be made and used at one scale."""
    module = importlib.import_module("train_vae")

    def gradients(folder, scaler):
        started, step, seen = module.start_run, torch.optim.AdamW.step, []

        def start_run(args):
            accelerator = started(args)
            accelerator.scaler = scaler
            return accelerator

        def kept(optimizer, *values):
            seen.append([parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]])
            return step(optimizer, *values)

        with monkeypatch.context() as patched:
            patched.setattr(module, "start_run", start_run)
            patched.setattr(torch.optim.AdamW, "step", kept)
            flags = ["--adversarial-weight", 0.5, "--adversarial-start", 0, "--max-train-steps", 1, "--grad-accum", grad_accum]
            flags += [
                "--max-grad-norm",
                1e6,
                "--optimizer",
                "adamw",
                "--output-dir",
                folder,
            ]  # in float32, accelerate unscales nothing to clip
            run_here("train_vae", [*vae_flags, *flags])
        return seen

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    plain, scaled = gradients(tmp_path / "plain", None), gradients(tmp_path / "scaled", scaler)
    assert scaler.get_scale() == 8.0, "one update a step"
    assert len(plain) == len(scaled) == 2, "the VAE's step and the discriminator's"
    for ours, theirs in zip(scaled, plain, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_judging_samples_changes_no_weight(unet_flags, raw_photos, tmp_path):
    photos = make_photos(tmp_path / "photos", classes=4, each=4)
    flags = [photos if flag == raw_photos else flag for flag in unet_flags]
    flags += ["--epochs", 1, "--validate-every", 1]
    run_here("train_unet", [*flags, "--output-dir", tmp_path / "plain"])
    run_here("train_unet", [*flags, "--evaluate-every", 1, "--output-dir", tmp_path / "judged"])
    weights = [load_file(next((tmp_path / run / "checkpoints").iterdir()) / "model.safetensors") for run in ("plain", "judged")]
    assert any(name.startswith("guess") for name in weights[0]), "the head that is made last"
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_losses_side_by_side_are_measured_alike(unet_flags, tmp_path, capsys):
    """The training loss is of latents with the posterior's noise, at other noise levels: in a panel of its own, and not on the line."""
    module = importlib.import_module("train_unet")
    assert not any("loss" in curves and len(curves) > 1 for curves in module.PANELS.values())
    run_here("train_unet", [*unet_flags, "--epochs", 1, "--sample-every", 1, "--output-dir", tmp_path])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "epoch 1: " in line]
    assert "val loss" in line
    assert "seen loss" in line
    assert not re.search(r"[:,] loss ", line)
    assert "loss" in metrics(tmp_path)[0]


def test_classes_without_dropped_labels_are_refused(unet_flags, tmp_path):
    done = script("train_unet", *unet_flags, "--label-dropout", 0, "--output-dir", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "--label-dropout 0: guidance leads away from the null label, which would never be trained" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    flags = ["--label-dropout", 0, "--unconditional", "--max-train-steps", 1, "--output-dir", tmp_path / "run"]
    run_here("train_unet", [*unet_flags, *flags])


def test_a_stopped_vae_measures_its_scale_on_a_few_photos(vae_flags, tmp_path, monkeypatch):
    module, asked = importlib.import_module("train_vae"), []
    encode = module.cache_moments
    monkeypatch.setattr(
        module, "cache_moments", lambda vae, pixels, *more, **named: (asked.append(len(pixels)), encode(vae, pixels, *more, **named))[1]
    )
    monkeypatch.setattr(module, "STOPPED_STATISTICS_OF", 5)
    measured = module.validate

    def validate(*values):
        os.kill(os.getpid(), signal.SIGTERM)
        return measured(*values)

    monkeypatch.setattr(module, "validate", validate)
    with pytest.raises(SystemExit):
        run_here("train_vae", [*vae_flags, "--epochs", 3, "--validate-every", 1, "--output-dir", tmp_path])
    assert asked == [5]
    assert len(AutoencoderKL.from_pretrained(tmp_path).config.latents_mean) == 4
    monkeypatch.setattr(module, "validate", measured)
    run_here("train_vae", [*vae_flags, "--epochs", 3, "--validate-every", 1, "--output-dir", tmp_path, "--resume", "latest"])
    assert asked == [5, 15]


def test_a_class_has_one_number_in_the_photos_and_in_the_pipeline(unet_flags, tmp_path):
    run_here("train_unet", [*unet_flags, "--classes", 2, 3, "--epochs", 1, "--output-dir", tmp_path / "run"])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert pipe.config.class_names == {"0": "snowy mountain", "1": "pine forest"}
    assert [pipe.config.class_names[str(label)] for label in pick_labels(pipe, ["2", "3", "snowy mountain"], 3)] == [
        "snowy mountain", "pine forest", "snowy mountain",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--class 1 is unknown: the classes are 2 snowy mountain, 3 pine forest"):
        pick_labels(pipe, ["1"], 1)
