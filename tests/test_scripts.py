"""Tests of the training scripts with tiny models: files, resuming, error messages, several processes."""

import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, UNET_CONFIG, launch, make_photos, run_here, script
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from corel_diffusers.data import latents
from corel_diffusers.data.latents import cache_moments, measure_latents
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.files import UserError
from corel_diffusers.sampling.samples import labels_for_images
from corel_diffusers.training import gauge, start, stopping, vae_models
from corel_diffusers.training import metrics as progress

SHORT = {"train_vae": ["--epochs", 4, "--checkpoint-every", 1], "train_unet": ["--epochs", 4, "--checkpoint-every", 1]}


def metrics(folder: Path) -> list[dict]:
    """Return the records of metrics.jsonl without the times, which differ in each run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(a: Path, b: Path, weights: str) -> None:
    """Check that two runs have bitwise equal weights in the model and in the last checkpoint, and equal metrics."""
    checkpoints = [sorted(p.name for p in (f / "checkpoints").iterdir())[-1] for f in (a, b)]
    assert checkpoints[0] == checkpoints[1]
    for name in (weights, f"checkpoints/{checkpoints[0]}/model.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys(), name
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert metrics(a) == metrics(b)
    steps = [line["step"] for line in metrics(a)]
    assert steps == sorted(set(steps))


def test_train_vae_writes_a_model_plots_and_metrics(trained_vae, raw_photos):
    vae = AutoencoderKL.from_pretrained(trained_vae)
    assert vae.config.sample_size == 32
    for name in (
        "training_losses.png",
        "reconstructions/epoch_0001.png",
        "samples/epoch_0002.png",
        "metrics.jsonl",
        "run.json",
    ):
        assert (trained_vae / name).stat().st_size > 0, name
    assert Image.open(trained_vae / "reconstructions" / "epoch_0002.png").height >= 64
    lines = metrics(trained_vae)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "reconstruction", "perceptual", "kl", "val_psnr", "val_ssim", "val_kl", "images_seen"} <= set(
        lines[0]
    )
    _, pixels = cache_pixels(load_photos(raw_photos), (32, 32))
    mean, std, _ = measure_latents(cache_moments(vae.eval(), pixels["train"], torch.device("cpu")))
    assert np.allclose(vae.config.latents_mean, mean, atol=1e-5)
    assert np.allclose(vae.config.latents_std, std, rtol=1e-4)
    assert vae.config.scaling_factor == 1


def test_train_unet_writes_a_pipeline_folder(trained_unet, trained_vae):
    for name in ("loss_history.png", "grid.png", "samples/epoch_0001.png", "README.md", "pipeline.py", "metrics.jsonl"):
        assert (trained_unet / name).stat().st_size > 0, name
    pipe = DiffusionPipeline.from_pretrained(trained_unet, trust_remote_code=True)
    assert pipe.scheduler.config.clip_sample is False
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert list(pipe.config.class_names.values()) == ["sunset at sea", "snowy mountain", "pine forest"]
    ours, theirs = load_file(trained_vae / "diffusion_pytorch_model.safetensors"), pipe.vae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), (
        "the pipeline has the VAE that its UNet was trained with"
    )
    assert pipe.vae.config.latents_mean == AutoencoderKL.from_pretrained(trained_vae).config.latents_mean


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_run(name, vae_flags, unet_flags, tmp_path):
    """SIGKILL, with gradient accumulation, EMA and the default learning rate schedule."""
    flags = [*(vae_flags if name == "train_vae" else unet_flags), *SHORT[name], "--grad-accum", 2, "--output-dir"]
    run_here(name, [*flags, tmp_path / "uninterrupted"])
    words = [sys.executable, str(ROOT / f"{name}.py"), *map(str, flags), str(tmp_path / "interrupted")]
    running = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    while not (tmp_path / "interrupted" / "checkpoints" / "step-000004").is_dir():
        time.sleep(0.01)
        assert running.poll() is None, "the run ended before it could be killed"
    running.kill()
    running.wait()
    done = script(name, *flags, tmp_path / "interrupted", "--resume", "latest")
    assert "resuming from" in done.stdout
    weights = {
        "train_vae": "diffusion_pytorch_model.safetensors",
        "train_unet": "unet/diffusion_pytorch_model.safetensors",
    }[name]
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "interrupted", weights)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("train_unet", ["--lr-scheduler", "plateau"]),
        ("train_unet", ["--lr-scheduler", "cosine", "--no-ema"]),
        ("train_unet", ["--lr-scheduler", "linear", "--prediction-type", "epsilon", "--unconditional"]),
        ("train_unet", ["--lr-scheduler", "none", "--schedule", "cosine", "--num-workers", 1]),
        (
            "train_unet",
            [
                "--lr-scheduler",
                "constant_with_warmup",
                "--lr-warmup-steps",
                3,
                "--mixed-precision",
                "bf16",
                "--attention",
                "math",
            ],
        ),
        (
            "train_unet",
            ["--optimizer", "muon", "--timesteps", "log-normal", "--zero-terminal-snr", "--validate-every", 2],
        ),
        ("train_unet", ["--views", 2, "--lr-scheduler", "cosine_warm_restarts"]),
        ("train_vae", ["--lr-scheduler", "cosine_warm_restarts", "--kl-target", 50, "--optimizer", "adamw"]),
        ("train_vae", ["--adversarial-weight", 0.5, "--crop-chance", 0.5]),
    ],
)
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_the_uninterrupted_run(
    name, extra, vae_flags, unet_flags, tmp_path, monkeypatch
):
    """SIGTERM between two steps of an epoch. The running means must continue as well."""
    flags = [
        *(vae_flags if name == "train_vae" else unet_flags),
        *extra,
        "--batch-size",
        2,
        "--epochs",
        2,
        "--output-dir",
    ]
    run_here(name, [*flags, tmp_path / "uninterrupted"])

    original = progress.show_progress

    def show_progress_and_stop(run):
        original(run)
        if run.state.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress, "show_progress", show_progress_and_stop)
    with pytest.raises(SystemExit) as exit_info:
        run_here(name, [*flags, tmp_path / "interrupted"])
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "interrupted" / "checkpoints" / "step-000011").is_dir()
    monkeypatch.setattr(progress, "show_progress", original)
    run_here(name, [*flags, tmp_path / "interrupted", "--resume", "latest"])
    weights = {
        "train_vae": "diffusion_pytorch_model.safetensors",
        "train_unet": "unet/diffusion_pytorch_model.safetensors",
    }[name]
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "interrupted", weights)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_to_all_processes_of_a_terminal_saves_a_checkpoint(name, vae_flags, tmp_path):
    """Ctrl-C reaches the workers that read batches too. The run needs their batches until it stops."""
    flags = [*vae_flags, "--num-workers", 1, "--grad-accum", 4, "--epochs", 10**5, "--output-dir", tmp_path]
    command = [sys.executable, ROOT / "train_vae.py", *map(str, flags)]

    def as_in_a_terminal() -> None:  # where the tests run, `nohup` or a shell may have made it ignore the signal
        signal.signal(getattr(signal, name), signal.SIG_DFL)

    options = {"start_new_session": True, "preexec_fn": as_in_a_terminal, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options)
    metrics, end = tmp_path / "metrics.jsonl", time.monotonic() + 120
    try:
        while not (metrics.is_file() and metrics.read_text()):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        os.killpg(process.pid, getattr(signal, name))
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + getattr(signal, name), errors
    assert "a checkpoint is saved: give --resume latest" in errors
    assert list((tmp_path / "checkpoints").glob("step-*"))


def test_a_run_in_a_thread_trains_and_leaves_the_signal_handlers_as_they_were(vae_flags, tmp_path):
    before, errors = signal.getsignal(signal.SIGINT), []
    flags = [*vae_flags, "--max-train-steps", 1, "--no-perceptual", "--output-dir"]

    def button() -> None:
        try:
            run_here("train_vae", [*flags, tmp_path / "thread"])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=button)
    thread.start()
    thread.join()
    run_here("train_vae", [*flags, tmp_path / "main"])
    assert not errors
    assert (tmp_path / "thread" / "config.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_the_models_are_freed_before_the_process_group_is_destroyed(name, vae_flags, unet_flags, tmp_path, monkeypatch):
    """Otherwise a run on several processes can hang at its end, see `end_run`."""
    models, alive, original_prepare, original_end = [], [], Accelerator.prepare, Accelerator.end_training

    def prepare(self, *objects, **options):
        prepared = original_prepare(self, *objects, **options)
        kept = prepared if isinstance(prepared, tuple) else (prepared,)
        models.extend(weakref.ref(part) for part in kept if isinstance(part, torch.nn.Module))
        return prepared

    def end_training(self):
        alive.extend(model() for model in models)
        original_end(self)

    monkeypatch.setattr(Accelerator, "prepare", prepare)
    monkeypatch.setattr(Accelerator, "end_training", end_training)
    flags = vae_flags if name == "train_vae" else unet_flags
    run_here(name, [*flags, "--max-train-steps", 2, "--output-dir", tmp_path])
    assert models
    assert alive == [None] * len(models)


def test_a_run_continues_in_another_precision_only_if_it_is_asked_to(vae_flags, tmp_path, capsys):
    """As an fp16 run does whose GPU was taken away. bf16 stands in for fp16, because it runs on each CPU."""
    flags = [word for word in vae_flags if word not in ("--mixed-precision", "no")]
    flags += ["--output-dir", tmp_path, "--checkpoint-steps", 1, "--no-perceptual"]
    run_here("train_vae", [*flags, "--mixed-precision", "bf16", "--max-train-steps", 2])
    flags += ["--mixed-precision", "no", "--max-train-steps", 4, "--resume", "latest"]
    with pytest.raises(UserError, match=r"mixed-precision was bf16, is no \(--change-precision continues in the new"):
        run_here("train_vae", flags)
    run_here("train_vae", [*flags, "--change-precision"])
    assert "will not end with the weights of a run without an interruption" in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["step"] == 4


def test_a_signal_at_the_last_step_leaves_a_finished_run(vae_flags, tmp_path, monkeypatch, capsys):
    original = progress.show_progress

    def show_progress_and_stop(run):
        original(run)
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress, "show_progress", show_progress_and_stop)
    with pytest.raises(SystemExit):
        run_here("train_vae", [*vae_flags, "--max-train-steps", 3, "--output-dir", tmp_path])
    assert json.loads((tmp_path / "run.json").read_text())["finished"]
    assert "stopped at step 3, the run is complete" in capsys.readouterr().err


def test_with_a_discriminator_the_latest_model_is_saved_even_if_its_loss_is_higher(
    vae_flags, tmp_path, monkeypatch, capsys
):
    module = importlib.import_module("train_vae")
    losses = iter((2.0, 1.0, 3.0, 4.0))  # the adversarial loss starts in the third epoch
    original_validate = module.validate
    monkeypatch.setattr(module, "validate", lambda *values: original_validate(*values) | {"val_loss": next(losses)})
    run_here(
        "train_vae",
        [*vae_flags, "--epochs", 4, "--adversarial-weight", 0.5, "--adversarial-start", 0.5, "--output-dir", tmp_path],
    )
    average = load_file(sorted((tmp_path / "checkpoints").iterdir())[-1] / "ema.safetensors")
    vae = AutoencoderKL.from_pretrained(tmp_path)
    assert all(torch.equal(value, average[str(index)]) for index, value in enumerate(vae.parameters()))
    assert "the VAE of epoch 4" in capsys.readouterr().out


def test_each_adversarial_backward_pass_changes_the_gradients_of_one_model_only(vae_flags, tmp_path, monkeypatch):
    module, models, passes = importlib.import_module("train_vae"), {}, []

    def record_model(model_name, build):
        def wrapped(*values):
            models[model_name] = build(*values)
            return models[model_name]

        return wrapped

    def gradients(model_name):
        return [None if p.grad is None else p.grad.clone() for p in models[model_name].parameters()]

    def differ(before, after):
        pairs = zip(before, after, strict=True)
        return any((a is None) != (b is None) or (a is not None and not torch.equal(a, b)) for a, b in pairs)

    original = Accelerator.backward

    def backward(self, loss, **more):
        before = {model_name: gradients(model_name) for model_name in models}
        original(self, loss, **more)
        passes.append({model_name for model_name in models if differ(before[model_name], gradients(model_name))})

    for name, model_name in (("VAEWithPosterior", "vae"), ("build_discriminator", "discriminator")):
        monkeypatch.setattr(vae_models, name, record_model(model_name, getattr(vae_models, name)))
    monkeypatch.setattr(Accelerator, "backward", backward)
    flags = ["--adversarial-weight", 0.5, "--adversarial-start", 0, "--max-train-steps", 3, "--output-dir", tmp_path]
    monkeypatch.setattr(
        module, "validate", lambda *values: {"val_loss": 1.0, "val_psnr": 1.0, "val_ssim": 1.0, "val_kl": 1.0}
    )
    run_here("train_vae", [*vae_flags, *flags])
    assert passes == 3 * [{"vae"}, {"discriminator"}]


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_a_run_that_ends_by_time_ends_on_time_with_the_lowest_learning_rate(
    name, vae_flags, unet_flags, tmp_path, monkeypatch
):
    flags = vae_flags if name == "train_vae" else unet_flags
    # each reading adds a quarter of a second, so the speed of the machine does not matter
    clock = itertools.count(step=0.25)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run_here(
        name, [*flags, "--lr-scheduler", "cosine", "--lr", 1e-3, "--max-train-minutes", 0.2, "--output-dir", tmp_path]
    )
    last = metrics(tmp_path)[-1]
    seconds = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    assert 12 <= seconds < 14
    assert last["learning_rate"] < 1e-4
    assert last["step"] > 5


def test_plan_prints_and_writes_nothing(vae_flags, tmp_path, capsys):
    """A run without those flags uses the same plan, and so does a resumed run."""
    common_flags = ["--data-dir", vae_flags[1], "--mixed-precision", "no", "--no-perceptual", "--output-dir", tmp_path]
    with pytest.raises(SystemExit) as exit_info:
        run_here("train_vae", [*common_flags, "--plan"])
    assert not exit_info.value.code
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert re.search(r"plan: --config tiny --image-size 64 --batch-size 2 .*--max-train-minutes 20", out)
    photos_per_second, images_seen, steps = (
        int(re.search(rf"([\d,]+) {word}", out)[1].replace(",", "")) for word in ("photos/s", "images", "steps")
    )
    assert images_seen == pytest.approx(20 * 60 * photos_per_second, rel=0.5)
    assert steps == pytest.approx(images_seen / 2, abs=1)
    run_here("train_vae", [*common_flags, "--max-train-steps", 1])
    assert json.loads((tmp_path / "run.json").read_text())["plan"] == {
        "config": "tiny", "image_size": "64", "batch_size": 2, "max_train_steps": 1,
        "perceptual_weight": 0.3, "adversarial_weight": 0.0, "kl_weight": 0.4 / 64**2,
        "mixed_precision": "no", "attention": "fused",
    }  # fmt: skip
    run_here("train_vae", [*common_flags, "--resume", "latest"])
    assert "plan: the settings that the run began with" in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["step"] == 1, "the length of the run is saved as well"
    run_here("train_vae", [*common_flags, "--max-train-steps", 1, "--resume", "latest"])
    assert "notice: the run is complete: to train longer, give a larger --max-train-steps" in capsys.readouterr().out
    run_here("train_vae", [*common_flags, "--max-train-steps", 2, "--resume", "latest"])
    assert metrics(tmp_path)[-1]["step"] == 2


def test_evaluate_every_measures_samples_during_training(unet_flags, raw_photos, tmp_path):
    """In bf16: `test_evaluating_samples_does_not_change_the_weights` evaluates in float32."""
    four_held_out = make_photos(tmp_path / "photos", classes=4, each=4)
    replaced = {raw_photos: four_held_out, "no": "bf16"}
    flags = [replaced.get(flag, flag) for flag in unet_flags]
    run_here(
        "train_unet", [*flags, "--epochs", 2, "--validate-every", 1, "--evaluate-every", 2, "--output-dir", tmp_path]
    )
    first, second = metrics(tmp_path)
    assert "kid_e3" not in first
    assert second["kid_e3"] > 0
    assert second["copies_pixels"] == 0
    for name in ("gauge", "gauge_1", "gauge_4", "seen_loss", "val_loss_2"):
        assert first[name] > 0
    assert first["gauge"] == pytest.approx(first["val_loss"] / first["seen_loss"], rel=1e-4)


def test_the_gauge_rises_when_the_model_memorises_a_few_photos(unet_flags, tmp_path):
    flags = [
        "--max-train-samples",
        3,
        "--epochs",
        320,
        "--validate-every",
        40,
        "--lr",
        2e-3,
        "--early-stopping-patience",
        0,
    ]
    run_here("train_unet", [*unet_flags, *flags, "--oscillation-window", 0, "--views", 0, "--output-dir", tmp_path])
    gauges = [line["gauge"] for line in metrics(tmp_path)]
    assert gauges[-1] > 1.3 * min(gauges[:3])


def test_gradient_accumulation_equals_a_larger_batch_within_rounding(vae_flags, tmp_path):
    common = [*vae_flags, "--max-train-steps", 3, "--lr", 1e-3, "--no-perceptual", "--output-dir"]
    run_here("train_vae", [*common, tmp_path / "one", "--batch-size", 4])
    run_here("train_vae", [*common, tmp_path / "two", "--batch-size", 2, "--grad-accum", 2])
    one, two = metrics(tmp_path / "one")[-1], metrics(tmp_path / "two")[-1]
    assert one["reconstruction"] == pytest.approx(two["reconstruction"], rel=1e-4)
    assert one["val_psnr"] == pytest.approx(two["val_psnr"], rel=1e-3)


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_two_processes_equal_one_process_with_the_same_global_batch(name, vae_flags, unet_flags, configs, tmp_path):
    """DDP over gloo on CPUs, started by torchrun and resumed once.

    The models have no dropout, because each process would draw its own masks.
    """
    config = configs / "without-dropout.json"
    config.write_text(json.dumps(UNET_CONFIG | {"dropout": 0.0}))
    # without KL warm-up: it depends on the length of the run, and the run "two" starts as a shorter one
    extra = {
        "train_vae": ["--no-perceptual", "--lr-scheduler", "none", "--kl-warmup", 0],
        "train_unet": ["--config", config, "--lr-scheduler", "plateau"],
    }[name]
    common = [*(vae_flags if name == "train_vae" else unet_flags), *extra, "--lr", 1e-3, "--output-dir"]
    port = {"train_vae": 29533, "train_unet": 29534}[name]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--master_port",
        port,
        ROOT / f"{name}.py",
    ]
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


def test_a_notice_if_no_unet_preset_can_take_the_image_size_of_the_vae(vae_flags, tmp_path, capsys):
    run_here("train_vae", [*vae_flags, "--image-size", 40, "--max-train-steps", 1, "--output-dir", tmp_path])
    expected = (
        "notice: --image-size 40: the UNet presets (they halve the latents twice) can take multiples of 16 px: "
        "give 32 or 48, or use your own UNet config"
    )
    assert expected in capsys.readouterr().out


def test_accelerate_launch_with_the_flags_of_older_scripts(unet_flags, tmp_path):
    flags = [
        "--output-dir", tmp_path, "--epochs", 1, "--grad-accum", 2, "--lr", "1e-4", "--image_size", 32,
        "--ema_decay", 0.995, "--schedule", "cosine", "--no-mixed-precision",
        "--lr-scheduler", "cosine_warm_restarts", "--lr-min", "1e-5",
        "--early-stopping-patience", 30, "--early-stopping-delta", "1e-5",
        "--oscillation-window", 10, "--oscillation-threshold", 0.0005, "--num-workers", 0,
    ]  # fmt: skip
    other_flags = [flag for flag in unet_flags if flag not in ("--mixed-precision", "no")]
    launch(sys.executable, "-m", "accelerate.commands.launch", "--cpu", ROOT / "train_unet.py", *other_flags, *flags)
    assert (tmp_path / "model_index.json").is_file()


def test_a_finished_run_continues_with_more_epochs_or_more_patience(unet_flags, tmp_path, capsys):
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
    assert len(metrics(tmp_path / "stopping")) == 4, "with more patience, the run continues"


def measure_losses(monkeypatch, held_out: list[float], seen: list[float]) -> None:
    """Replace the losses that the validations of train_unet.py measure."""
    losses = zip(held_out, seen, strict=True)

    def overfitting_gauge(*_: object) -> dict[str, float]:
        val_loss, seen_loss = next(losses)
        return {"val_loss": val_loss, "seen_loss": seen_loss, "gauge": val_loss / seen_loss}

    monkeypatch.setattr(gauge, "overfitting_gauge", overfitting_gauge)
    monkeypatch.setattr(gauge, "SAVE_UP_TO_GAUGE", 1.075)


def test_early_stopping_uses_the_held_out_loss_only_after_the_gauge_has_risen(unet_flags, tmp_path, monkeypatch):
    measure_losses(monkeypatch, [1.0, 1.01, 1.03, 1.05, 1.04, 1.07, 1.08], [1.0, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93])
    flags = ["--epochs", 9, "--validate-every", 1, "--early-stopping-patience", 2, "--oscillation-window", 0]
    run_here("train_unet", [*unet_flags, *flags, "--output-dir", tmp_path])
    published = [line["published"] for line in metrics(tmp_path)]
    assert published[:4] == [1, 1, 1, 0], "models are saved up to the limit of the gauge"
    assert len(published) == 7, (
        "the fifth loss is progress, because only the losses after the gauge has risen count; the last two are not"
    )


def test_a_run_that_ends_by_time_stops_early_when_the_model_memorises_the_photos(
    unet_flags, tmp_path, monkeypatch, capsys
):
    measure_losses(monkeypatch, [1.0, 1.0, 1.0, 1.0, 1.1], [1.0, 1.0, 1.0, 1.0, 0.9])
    monkeypatch.setattr(stopping, "STOP_AFTER_IDLE", 0.0)
    flags = [*unet_flags, "--max-train-minutes", 5, "--validate-every", 1, "--output-dir", tmp_path]
    run_here("train_unet", flags)
    assert [line["published"] for line in metrics(tmp_path)] == [1, 1, 1, 1, 0], (
        "no loss is lower, but the gauge is below its limit"
    )
    assert "epoch 4, out of 5 so far (the model memorises the photos" in (out := capsys.readouterr().out)
    assert "give --early-stopping-patience 0 to continue" in out
    run_here("train_unet", [*flags, "--resume", "latest"])
    assert len(metrics(tmp_path)) == 5, "the resumed run does not train either"


def test_train_unet_refuses_an_unfinished_vae(vae_flags, unet_flags, tmp_path, monkeypatch):
    """A VAE killed before its latent scale is measured. A UNet trained on it would use a scale of 1."""
    monkeypatch.setattr(latents, "measure_latents", lambda moments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_here("train_vae", [*vae_flags, "--output-dir", tmp_path / "vae", "--max-train-steps", 1, "--no-perceptual"])
    with pytest.raises(UserError, match="its training is not finished"):
        run_here("train_unet", [*unet_flags, "--vae-checkpoint", tmp_path / "vae", "--output-dir", tmp_path / "unet"])
    assert not (tmp_path / "unet").exists()


def test_resuming_a_finished_run_without_checkpoints_does_not_overwrite_its_model(unet_flags, tmp_path):
    run_here("train_unet", [*unet_flags, "--output-dir", tmp_path, "--max-train-steps", 1])
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="a finished run without checkpoints"):
        run_here("train_unet", [*unet_flags, "--output-dir", tmp_path, "--max-train-steps", 1, "--resume", "latest"])


def test_photos_of_one_class_give_an_unconditional_model(raw_photos, configs, trained_vae, tmp_path):
    flags = [
        "--image-dir",
        raw_photos,
        "--classes",
        "2",
        "--vae-checkpoint",
        trained_vae,
        "--config",
        configs / "unet.json",
    ]
    run_here("train_unet", [*flags, "--output-dir", tmp_path, "--max-train-steps", 2, "--batch-size", 2])
    pipe = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert pipe.config.class_names is None
    assert len(pipe(1, num_inference_steps=2).images) == 1


def test_flags_metrics_and_images_are_sent_to_tensorboard(vae_flags, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = [*vae_flags, "--max-train-steps", 2, "--report-to", "all", "--no-perceptual", "--sample-every", 1]
    run_here("train_vae", [*flags, "--output-dir", tmp_path])
    folder = next((tmp_path / "logs" / "train_vae").glob("events.*")).parent
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert events.Scalars("val_psnr")[-1].value == pytest.approx(metrics(tmp_path)[-1]["val_psnr"], rel=1e-4)
    sent = Image.open(io.BytesIO(events.Images("reconstructions")[-1].encoded_image_string))
    saved = Image.open(sorted((tmp_path / "reconstructions").glob("*.png"))[-1])
    assert np.array_equal(sent, saved)
    hyperparameters = yaml.safe_load(next((tmp_path / "logs").rglob("hparams.yml")).read_text())
    assert hyperparameters["max_train_steps"] == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_work_without_a_network(name, unet_flags, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    flags = [*unet_flags, "--max-train-steps", 2, "--report-to", name, "--sample-every", 1]
    script("train_unet", *flags, "--output-dir", tmp_path / "run")
    assert list(tmp_path.rglob("*.wandb" if name == "wandb" else "trackio/*.db"))


REFUSED = [
    ("train_vae", ["--batch-size", 0], "--batch-size 0: give 1 or more"),
    ("train_vae", ["--image-size", "big"], "--image-size big: give pixels as 128, or as 96x144"),
    ("train_vae", ["--data-dir", "nowhere"], "--data-dir nowhere is not a folder"),
    ("train_vae", ["--config", "huge"], "--config huge is unknown"),
    ("train_vae", ["--lr", "-1"], "--learning-rate -1.0: give a number above 0"),
    ("train_vae", ["--lr", "1e-6", "--lr-min", "1e-5"], "--lr-min 1e-05: give at most --learning-rate"),
    (
        "train_unet",
        ["--vae-checkpoint", "nowhere"],
        "--vae-checkpoint nowhere is not a folder: train with train_vae.py first",
    ),
    (
        "train_unet",
        ["--vae-checkpoint", "vae_models/best_model.pt"],
        "--vae-checkpoint vae_models/best_model.pt is not a folder: train with",
    ),
    ("train_unet", ["--seed", -1], "--seed -1: give 0 or more"),
    ("train_unet", ["--push-to-hub"], "--push-to-hub needs --hub-model-id"),
    ("train_unet", ["--ema-decay", "1.5"], "--ema-decay 1.5"),
    (
        "train_vae",
        ["--adversarial-start", "1.5"],
        "--adversarial-start 1.5: give a fraction of the run from 0 to below 1",
    ),
    ("train_unet", ["--epochs", 3, "--max-train-minutes", 1], "--epochs and --max-train-minutes exclude each other"),
]


@pytest.mark.parametrize(("name", "flags", "expected"), REFUSED)
def test_an_invalid_flag_gives_one_line_and_writes_nothing(name, flags, expected, tmp_path):
    with pytest.raises(UserError, match=re.escape(expected)) as refused:
        run_here(name, [*flags, "--output-dir", tmp_path / "out"])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "flags", "expected"), [REFUSED[0], REFUSED[6]])
def test_an_invalid_flag_is_refused_before_the_heavy_imports(name, flags, expected, tmp_path):
    words = [sys.executable, "-X", "importtime", ROOT / f"{name}.py", *flags, "--output-dir", tmp_path / "out"]
    done = launch(*words, check=False)
    imported, messages = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else messages).append(line)
    assert done.returncode == 2
    assert len(messages) == 1
    assert messages[0].startswith(f"error: {expected}")
    assert not (tmp_path / "out").exists()
    assert {"json", "tyro"} < (names := {line.split("|")[-1].strip() for line in imported})
    assert not names & {"torch", "datasets", "diffusers", "accelerate", "transformers"}


def test_errors_about_photos_or_run_folder_come_before_anything_is_written(
    vae_flags, unet_flags, trained_vae, tmp_path
):
    (tmp_path / "empty").mkdir()
    out = ["--output-dir", tmp_path / "a"]
    for name, flags, expected in (
        ("train_vae", ["--data-dir", tmp_path / "empty", *out], "No images found in"),
        (
            "train_vae",
            [*vae_flags, "--image-size", 30, *out],
            "--image-size 30: the VAE can take multiples of 4 px: give 28 or 32",
        ),
        (
            "train_vae",
            [*vae_flags, "--output-dir", trained_vae / "run.json" / "a"],
            "run.json is a file, so no folder can be created there",
        ),
        ("train_vae", [*vae_flags, "--output-dir", trained_vae], "already holds a run: give --resume latest"),
        (
            "train_vae",
            [*vae_flags, "--output-dir", trained_vae, "--resume", "latest", "--lr", 0.5],
            "learning-rate was 0.001, is 0.5",
        ),
        ("train_unet", [*unet_flags, "--vae-checkpoint", tmp_path / "empty", *out], "no VAE can be loaded"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=re.escape(expected)) as error:
            run_here(name, flags)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before, "no file is written"


def test_fp16_without_a_gpu_gives_one_line(vae_flags, tmp_path):
    done = script("train_vae", *vae_flags, "--output-dir", tmp_path / "a", "--mixed-precision", "fp16", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --mixed-precision fp16 needs a GPU")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_out_of_memory_gives_one_line_with_the_flags_that_help(vae_flags, tmp_path):
    limit = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30,) * 2); sys.argv = sys.argv[1:]"
    )
    code = f"{limit}; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = [
        *vae_flags,
        "--batch-size",
        16384,
        "--image-size",
        64,
        "--output-dir",
        tmp_path / "out",
        "--max-train-steps",
        1,
    ]
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
def test_the_vae_and_the_discriminator_use_the_same_loss_scale_in_a_step(grad_accum, vae_flags, tmp_path, monkeypatch):
    """The gradients of the discriminator must be computed and used with the same loss scale.

    In this test the scaler doubles its scale after each update. An update after the VAE's part of the step would change
    the scale too early.
    """

    def gradients(folder, scaler):
        original_start_run, step, gradients_of_steps = start.start_run, torch.optim.AdamW.step, []

        def start_run(args):
            accelerator = original_start_run(args)
            accelerator.scaler = scaler
            return accelerator

        def record_gradients(optimizer, *values):
            gradients_of_steps.append(
                [parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]]
            )
            return step(optimizer, *values)

        with monkeypatch.context() as patched:
            patched.setattr(start, "start_run", start_run)
            patched.setattr(torch.optim.AdamW, "step", record_gradients)
            flags = [
                "--adversarial-weight",
                0.5,
                "--adversarial-start",
                0,
                "--max-train-steps",
                1,
                "--grad-accum",
                grad_accum,
            ]
            # in float32, accelerate does not unscale gradients before clipping, so nothing may be clipped
            flags += [
                "--max-grad-norm",
                1e6,
                "--optimizer",
                "adamw",
                "--output-dir",
                folder,
            ]
            run_here("train_vae", [*vae_flags, *flags])
        return gradients_of_steps

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    plain, scaled = gradients(tmp_path / "plain", None), gradients(tmp_path / "scaled", scaler)
    assert scaler.get_scale() == 8.0, "one update per step"
    assert len(plain) == len(scaled) == 2, "one step of the VAE and one of the discriminator"
    for ours, theirs in zip(scaled, plain, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_evaluating_samples_does_not_change_the_weights(unet_flags, raw_photos, tmp_path):
    photos = make_photos(tmp_path / "photos", classes=4, each=4)
    flags = [photos if flag == raw_photos else flag for flag in unet_flags]
    flags += ["--epochs", 1, "--validate-every", 1]
    run_here("train_unet", [*flags, "--output-dir", tmp_path / "plain"])
    run_here("train_unet", [*flags, "--evaluate-every", 1, "--output-dir", tmp_path / "judged"])
    weights = [
        load_file(next((tmp_path / run / "checkpoints").iterdir()) / "model.safetensors") for run in ("plain", "judged")
    ]
    assert any(name.startswith("guess") for name in weights[0]), "the module that is built last"
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_losses_that_are_shown_together_are_measured_in_the_same_way(unet_flags, tmp_path, capsys):
    """The training loss is measured on latents with the posterior's noise and at other noise levels.

    It therefore has its own panel and is not in the printed line.
    """
    module = importlib.import_module("train_unet")
    assert [len(curves) for curves in module.PANELS.values() if "loss" in curves] == [1]
    run_here("train_unet", [*unet_flags, "--epochs", 1, "--sample-every", 1, "--output-dir", tmp_path])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "epoch 1: " in line]
    assert "val loss" in line
    assert "seen loss" in line
    assert not re.search(r"[:,] loss ", line)
    assert "loss" in metrics(tmp_path)[0]


def test_label_dropout_0_with_classes_is_refused(unet_flags, tmp_path):
    with pytest.raises(
        UserError, match="--label-dropout 0: guidance needs the null label, but it would never be trained"
    ):
        run_here("train_unet", [*unet_flags, "--label-dropout", 0, "--output-dir", tmp_path / "run"])
    assert not (tmp_path / "run").exists()
    flags = ["--label-dropout", 0, "--unconditional", "--max-train-steps", 1, "--output-dir", tmp_path / "run"]
    run_here("train_unet", [*unet_flags, *flags])


def test_a_stopped_vae_run_measures_the_latent_scale_on_a_few_photos(vae_flags, tmp_path, monkeypatch):
    module, photo_counts = importlib.import_module("train_vae"), []
    monkeypatch.setattr(
        latents,
        "cache_moments",
        lambda vae, pixels, *more, **named: (
            photo_counts.append(len(pixels)),
            cache_moments(vae, pixels, *more, **named),
        )[1],
    )
    monkeypatch.setattr(module, "STATISTICS_PHOTOS_WHEN_STOPPED", 5)
    original_validate = module.validate

    def validate(*values):
        os.kill(os.getpid(), signal.SIGTERM)
        return original_validate(*values)

    monkeypatch.setattr(module, "validate", validate)
    with pytest.raises(SystemExit):
        run_here("train_vae", [*vae_flags, "--epochs", 3, "--validate-every", 1, "--output-dir", tmp_path])
    assert photo_counts == [5]
    assert len(AutoencoderKL.from_pretrained(tmp_path).config.latents_mean) == 4
    monkeypatch.setattr(module, "validate", original_validate)
    run_here(
        "train_vae", [*vae_flags, "--epochs", 3, "--validate-every", 1, "--output-dir", tmp_path, "--resume", "latest"]
    )
    assert photo_counts == [5, 15]


def test_a_class_has_the_same_number_in_the_photos_and_in_the_pipeline(unet_flags, tmp_path):
    run_here("train_unet", [*unet_flags, "--classes", 2, 3, "--epochs", 1, "--output-dir", tmp_path / "run"])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert pipe.config.class_names == {"0": "snowy mountain", "1": "pine forest"}
    assert [
        pipe.config.class_names[str(label)] for label in labels_for_images(pipe, ["2", "3", "snowy mountain"], 3)
    ] == ["snowy mountain", "pine forest", "snowy mountain"]
    with pytest.raises(UserError, match="--class 1 is unknown: the classes are 2 snowy mountain, 3 pine forest"):
        labels_for_images(pipe, ["1"], 1)
