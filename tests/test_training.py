"""Tests of the parts that both training loops share: run length, compilation, metrics, stopping."""

import importlib
import json
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_run, run_here
from safetensors.torch import load_file

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.files import (
    UserError,
    atomic_file,
    best_record,
    read_metrics,
)
from corel_diffusers.runtime import compilation
from corel_diffusers.saved_models import atomic_model_save, finish_model_save
from corel_diffusers.training import ema, optimizers, start
from corel_diffusers.training.intervals import checkpoint_due, epochs_between_validations, samples_due
from corel_diffusers.training.length import RunLength
from corel_diffusers.training.metrics import append_metrics
from corel_diffusers.training.run import Run
from corel_diffusers.training.running_mean import RunningMean
from corel_diffusers.training.start import start_run
from corel_diffusers.training.state import RunState
from corel_diffusers.training.stopping import early_stop_reason, update_early_stopping


def test_a_run_that_ends_by_time_has_ten_checkpoints_and_ten_sample_grids():
    args, checkpoints = VAEArguments(max_train_minutes=10), []
    run = make_run(args, validate_every=4)
    for run.state.step in range(1, 601):  # each step takes one second, and an epoch has five steps
        run.length.previous_seconds, run.state.seconds = run.state.seconds, float(run.state.step)
        if checkpoint_due(run):
            checkpoints.append(run.state.step)
        if run.plan.ends_epoch(run.state.step, 4):
            run.history.append({"seconds": run.state.seconds, "shown": samples_due(run)})
    assert checkpoints == list(range(60, 601, 60))
    assert [record["seconds"] for record in run.history if record["shown"]] == list(range(60, 601, 60))
    long_run = RunLength(None, 36_000.0, 0.0, previous_seconds=599.0)
    assert checkpoint_due(make_run(args, 1, 600.5, length=long_run)), "a crash loses at most ten minutes"
    args = replace(args, checkpoint_every=3, sample_every=8)
    assert [step for step in range(1, 31) if checkpoint_due(make_run(args, step))] == [15, 30]
    sampled = [epoch for epoch in range(4, 33, 4) if samples_due(make_run(args, 5 * epoch, validate_every=4))]
    assert sampled == [8, 16, 24, 32]


def test_a_loss_that_starts_in_mid_epoch_is_averaged_over_its_own_forward_passes():
    accelerator, state = Accelerator(cpu=True), RunState()
    means = RunningMean(state, accelerator.device)
    means.add(loss=torch.tensor(1.0))
    means.add(loss=torch.tensor(2.0), adversarial=torch.tensor(8.0))
    means.store(state, accelerator)
    resumed = RunningMean(RunState(**json.loads(json.dumps(asdict(state)))), accelerator.device)
    resumed.add(loss=torch.tensor(6.0), adversarial=torch.tensor(10.0))
    assert resumed.means() == resumed.close(accelerator) == {"loss": 3.0, "adversarial": 9.0}
    assert resumed.means() == {}, "the next epoch starts from zero"


def test_ema_weights_match_the_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    average, expected = ema.build_ema(UNetArguments(ema_decay=0.9), model), float(model.weight.detach())
    for step in range(1, 60):
        model.weight.data.fill_(step**0.5)
        average.step(list(model.parameters()))
        decay = min(0.9, 1 - step ** (-2 / 3))
        expected = decay * expected + (1 - decay) * step**0.5
        assert float(average.shadow_params[0]) == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_clipped_as_by_torch(limit):
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    for model in models:
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter) + index
    before = [parameter.grad.clone() for parameter in models[0].parameters()]
    optimizers.clip_gradients(Accelerator(cpu=True), None, list(models[0].parameters()), limit)
    torch.nn.utils.clip_grad_norm_(models[1].parameters(), limit)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.equal(a.grad, b) for a, b in zip(models[0].parameters(), before, strict=True)) == (limit > 1)


def test_default_intervals_of_checkpoints_and_samples_in_a_run_of_epochs():
    plan = BatchPlan(4, 4, 1, 1, 0, seed=0)
    for arguments_class, expected in ((VAEArguments, [20, 40]), (UNetArguments, [10, 20, 30, 40])):
        args = arguments_class(epochs=40)
        runs = {step: make_run(args, step, plan=plan) for step in range(1, 41)}
        assert [step for step, run in runs.items() if checkpoint_due(run)] == expected
        assert [step for step, run in runs.items() if samples_due(run)] == [10, 20, 30, 40]


def test_a_checkpoint_is_due_after_ten_minutes_even_in_a_long_epoch():
    length, plan = RunLength(10**6, None, 0.0, previous_seconds=599.0), BatchPlan(10**6, 4, 1, 1, 0, seed=0)
    for seconds, is_due in ((600.5, True), (599.5, False)):
        run = make_run(VAEArguments(epochs=4), 1, seconds, length=length, plan=plan)
        assert checkpoint_due(run) == is_due


@pytest.mark.parametrize(
    ("spent", "message", "left"),
    [
        (10, "", 590),
        (200, "took 3.3 of the 10 minutes; the photos are cached", 400),
        (660, "took 11.0 of the 10 minutes, so the run takes 6.0 more; the photos are cached", 300),
    ],
)
def test_a_run_trains_for_half_of_its_minutes_however_long_its_start_is(spent, message, left, monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    plan, args, state = BatchPlan(20, 4, 1, 1, 0, seed=0), VAEArguments(max_train_minutes=10), RunState()
    accelerator = Accelerator(cpu=True)
    length = RunLength.of(args, plan, state, -spent)
    assert length.began == -spent
    length.allow_slow_start(state, accelerator)
    out = capsys.readouterr().out
    assert message in out
    assert bool(out) == bool(message)
    length.tick(state, accelerator)
    assert length.seconds - state.seconds == left


def test_validation_takes_the_same_fraction_of_the_time_with_any_number_of_processes():
    args = VAEArguments(max_train_minutes=10)
    every = [
        epochs_between_validations(args, BatchPlan(100, 10 // n, 1, n, 0, seed=0), forward_passes=90) for n in (1, 2, 5)
    ]
    assert every == [10, 20, 50], "each process validates all photos but trains on only a part of them"


def test_samples_and_evaluations_that_are_asked_for_come_with_a_validation():
    plan = BatchPlan(100, 10, 1, 1, 0, seed=0)
    for flags, every in (({}, 10), ({"sample_every": 1}, 1), ({"sample_every": 40}, 10), ({"evaluate_every": 3}, 3)):
        args = UNetArguments(max_train_minutes=10, **flags)
        assert epochs_between_validations(args, plan, forward_passes=90) == every


def test_a_folder_with_only_checkpoints_counts_as_a_run(tmp_path):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run: give --resume latest"):
        start.start_run(VAEArguments(output_dir=str(tmp_path), mixed_precision="no"))


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_downloaded_model_is_not_overwritten(tmp_path, resume):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"holds a model_index\.json that was not written by a run: give another folder"
    ):
        start.start_run(VAEArguments(output_dir=str(tmp_path), mixed_precision="no", resume=resume))
    assert [file.name for file in tmp_path.iterdir()] == ["model_index.json"]


def test_the_launcher_can_select_the_cpu_on_a_machine_with_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = VAEArguments(output_dir=str(tmp_path))
    AcceleratorState._reset_state(True)
    accelerator = start.start_run(args)
    assert accelerator.device.type == "cpu"
    assert accelerator.mixed_precision != "fp16"
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("compiled", "to_come", "expected"),
    [
        (
            0.05,
            10_000,
            "50 ms per step instead of 100, after 60 s of compiling: it saves time after 1,200 of 10,000 steps",
        ),
        (0.05, 1_000, "compiling costs this run more time than it saves: omit --compile"),
        (
            0.11,
            10_000,
            "110 ms per step instead of 100, after 60 s of compiling: compiling costs this run more time than",
        ),
    ],
)
def test_the_compilation_report_says_whether_compiling_saves_time(compiled, to_come, expected):
    assert expected in compilation.compilation_report(0.1, compiled, 60.0, to_come)


class TwoLayers(torch.nn.Module):
    """Two layers. `compile` does not change them, or loses the gradients of the first layer if `broken`."""

    def __init__(self, broken):
        super().__init__()
        self.first, self.second, self.broken = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), broken
        torch.nn.init.constant_(self.second.weight, 9.0)

    def forward(self, values, detach=False):
        inner = self.first(values)
        return (self.second(inner.detach() if detach else inner),)

    def compile(self):
        self._compiled_call_impl = lambda values: self.forward(values, detach=self.broken)


@pytest.mark.parametrize(("broken", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_a_compiled_model_with_wrong_gradients_is_not_used(broken, dropout, capsys):
    """With dropout no two forward passes are equal, so the gradients are not checked."""
    AcceleratorState._reset_state(True)
    model, state = TwoLayers(broken), RunState()
    model.dropout = torch.nn.Dropout(dropout)
    stays_compiled = not broken or dropout
    compiled = compilation.Compilation(SimpleNamespace(compile=True), Accelerator(cpu=True), model, state.step)
    for step in range(1, 44):
        assert (model._compiled_call_impl is not None) == (step > 13 and bool(stays_compiled))
        model(torch.randn(2, 4))[0].sum().backward()
        compiled.tick(step, steps_to_come=100)
    AcceleratorState._reset_state(True)
    out = capsys.readouterr().out
    assert ("the run continues uncompiled" in out) == (not stays_compiled)
    assert ("ms per step instead of" in out) == bool(stays_compiled)


def test_a_resumed_run_is_compiled_after_its_first_step(capsys):
    AcceleratorState._reset_state(True)
    model = TwoLayers(broken=False)
    compiled = compilation.Compilation(SimpleNamespace(compile=True), Accelerator(cpu=True), model, 20)
    model(torch.randn(2, 4))
    compiled.tick(21, steps_to_come=100)
    assert model._compiled_call_impl
    assert capsys.readouterr().out == ""
    AcceleratorState._reset_state(True)


def test_the_best_record_is_the_last_one_marked_as_published_or_has_the_lowest_loss():
    history = [{"val_loss": loss, "epoch": epoch} for epoch, loss in enumerate((3.0, 1.0, 2.0))]
    assert best_record(history)["epoch"] == 1
    marked = [
        record | {"published": is_published} for record, is_published in zip(history, (1.0, 1.0, 0.0), strict=True)
    ]
    assert best_record(marked)["epoch"] == 1
    assert best_record([*marked, {"val_loss": 1.2, "published": 1.0, "epoch": 3}])["epoch"] == 3


def test_early_stopping_by_patience_and_delta():
    state = RunState()
    for loss in (1.0, 0.9, 0.8999999, 0.9, 0.95):
        update_early_stopping(state, loss, delta=1e-5)
    assert state.validations_waited == 3, "a decrease of less than delta is not progress"
    assert early_stop_reason(state, 4, 0, 0.0) == ""
    assert "no lower loss in 3 validations" in early_stop_reason(state, 3, 0, 0.0)
    assert early_stop_reason(state, 0, 0, 0.0) == "", "0 turns early stopping off"


def test_early_stopping_by_oscillation():
    def reason_after(losses):
        state = RunState()
        for loss in losses:
            update_early_stopping(state, loss, window=10)
        return early_stop_reason(state, 100, 10, 0.0005)

    assert "oscillates without falling" in reason_after([0.5 + 0.01 * (-1) ** n for n in range(10)])
    assert reason_after([0.5 + 0.01 * (-1) ** n for n in range(9)]) == "", "the window is not full"
    assert reason_after([0.5 + 0.01 * (-1) ** n - 0.002 * n for n in range(10)]) == "", "it oscillates, but it falls"
    assert reason_after([0.5 + 0.001 * n for n in range(10)]) == "", (
        "it rises without oscillating: patience handles this"
    )


def test_metrics_survive_a_kill_in_mid_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (5, 10):
        append_metrics(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 1')
    assert [record["step"] for record in read_metrics(path)] == [5, 10]


def test_files_are_written_atomically(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.txt") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("killed_at", range(7))
def test_a_killed_save_leaves_the_complete_old_or_the_complete_new_model(tmp_path, monkeypatch, killed_at):
    """A kill after any rename must not leave new weights with an old config. The next run completes the save."""
    for name in ("config.json", "weights", "more/weights"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    renames, original = [], os.replace

    def replace_or_kill(source, target):
        if len(renames) == killed_at:
            raise KeyboardInterrupt
        renames.append(original(source, target))

    monkeypatch.setattr("os.replace", replace_or_kill)
    with (
        pytest.raises(KeyboardInterrupt) if killed_at < 6 else nullcontext(),
        atomic_model_save(tmp_path) as folder,
    ):
        for name in ("config.json", "weights", "more/weights"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
    monkeypatch.undo()
    if (tmp_path / "config.json").is_file():
        assert len({(tmp_path / name).read_text() for name in ("config.json", "weights", "more/weights")}) == 1
    finish_model_save(tmp_path)
    contents = {(tmp_path / name).read_text() for name in ("config.json", "weights", "more/weights")}
    assert contents == ({"old"} if killed_at < 2 else {"new"})  # the manifest is written first


def test_the_out_of_memory_message_has_the_settings_and_the_flags_that_help():
    args = VAEArguments(batch_size=16, image_size="128")
    with pytest.raises(
        UserError,
        match="--batch-size 16 at 128x128 px.* try --batch-size 8 --grad-accum 2 .* "
        "--gradient-checkpointing, or a smaller --image-size",
    ):
        with start.explain_out_of_memory(args):
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), start.explain_out_of_memory(args):
        raise RuntimeError("something else")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_a_run_out_of_memory_goes_on_with_smaller_batches(name, vae_flags, unet_flags, tmp_path, monkeypatch, capsys):
    """The reference is a run that divides its batches from the beginning."""
    flags = [*(vae_flags if name == "train_vae" else unet_flags), "--max-train-steps", 3]
    run_here(name, [*flags, "--output-dir", tmp_path / "divided", "--batch-size", 2, "--grad-accum", 2])
    module = importlib.import_module(name)
    step = {"train_vae": "autoencoder_step", "train_unet": "denoising_step"}[name]
    original = getattr(module, step)

    def step_with_little_memory(run: Run, *arguments: object) -> object:
        if run.state.step == 1 and run.args.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(run, *arguments)

    monkeypatch.setattr(module, step, step_with_little_memory)
    with pytest.raises(UserError, match="out of memory with --batch-size 4"):
        run_here(name, [*flags, "--output-dir", tmp_path / "stopped"])
    run_here(name, [*flags, "--output-dir", tmp_path / "run", "--auto-batch-size"])
    assert "notice: out of memory: the run continues with --batch-size 2 --grad-accum 2" in capsys.readouterr().out
    runs = [load_file(tmp_path / run / "checkpoints/step-000003/model.safetensors") for run in ("divided", "run")]
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    resumed = VAEArguments(auto_batch_size=True).resolved(plan | {"image_size": "32"})
    assert (resumed.batch_size, resumed.grad_accum) == (2, 2), "without --batch-size, a resumed run divides as before"


def test_grad_accum_overrides_the_launchers_accumulation_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    AcceleratorState._reset_state(True)
    args = VAEArguments(output_dir=str(tmp_path), mixed_precision="no")
    accelerator = start_run(args)
    model = torch.nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    stepped = []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            before = model.weight.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            stepped.append(not torch.equal(before, model.weight))
    assert stepped == [True] * 4
    assert "asks for 2 gradient accumulation steps, but the run uses --grad-accum 1" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_unsupported_kinds_of_distributed_training_are_refused(name, kind, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"accelerate launch: {kind} is not supported"):
        start_run(VAEArguments(output_dir=str(tmp_path / "run"), mixed_precision="no"))
    assert not (tmp_path / "run").exists()
