"""The pieces around the loops: length, compiling, metrics, stopping."""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from corel_diffusers import training
from corel_diffusers.arguments import UNetArguments, VAEArguments
from corel_diffusers.batches import BatchPlan
from corel_diffusers.checkpoints import RunState
from corel_diffusers.files import UserError, best_record, finish_publishing, published_model, read_metrics, whole_file
from corel_diffusers.training import (
    RunLength,
    RunningMean,
    append_metrics,
    checkpoint_due,
    early_stop,
    epochs_between_validations,
    pictures_due,
    start_run,
    watch,
)


def test_a_run_of_minutes_has_ten_checkpoints_and_ten_pictures():
    plan, args = BatchPlan(20, 4, 1, 1, 0, seed=0), VAEArguments(max_train_minutes=10)
    length, state, history, checkpoints = RunLength(None, 600.0, 0.0), RunState(), [], []
    for state.step in range(1, 601):  # a second each, an epoch every five
        length.before, state.seconds = state.seconds, float(state.step)
        if checkpoint_due(args, plan, state, length):
            checkpoints.append(state.step)
        if plan.ends_epoch(state.step, 4):
            history.append({"seconds": state.seconds, "shown": pictures_due(args, plan.epoch(state.step), 4, length, state, history)})
    assert checkpoints == list(range(60, 601, 60))
    assert [record["seconds"] for record in history if record["shown"]] == list(range(60, 601, 60))
    long = RunLength(None, 36_000.0, 0.0, before=599.0)
    assert checkpoint_due(args, plan, RunState(step=1, seconds=600.5), long), "no more than ten minutes are lost"
    args.checkpoint_every, args.sample_every = 3, 8
    assert [step for step in range(1, 31) if checkpoint_due(args, plan, RunState(step=step), length)] == [15, 30]
    assert [epoch for epoch in range(4, 33, 4) if pictures_due(args, epoch, 4, length, state, history)] == [8, 16, 24, 32]


def test_a_term_that_begins_in_mid_epoch_is_averaged_over_its_own_passes():
    accelerator, state = Accelerator(cpu=True), RunState()
    means = RunningMean(state, accelerator.device)
    means.add(loss=torch.tensor(1.0))
    means.add(loss=torch.tensor(2.0), adversarial=torch.tensor(8.0))
    means.store(state, accelerator)
    resumed = RunningMean(RunState(**json.loads(json.dumps(asdict(state)))), accelerator.device)
    resumed.add(loss=torch.tensor(6.0), adversarial=torch.tensor(10.0))
    assert resumed.means() == resumed.close(accelerator) == {"loss": 3.0, "adversarial": 9.0}
    assert resumed.means() == {}, "the next epoch begins anew"


def test_the_average_of_the_weights_is_the_formulas():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = training.build_ema(UNetArguments(ema_decay=0.9), model), float(model.weight.detach())
    for step in range(1, 60):
        model.weight.data.fill_(step**0.5)
        ema.step(list(model.parameters()))
        decay = min(0.9, 1 - step ** (-2 / 3))
        expected = decay * expected + (1 - decay) * step**0.5
        assert float(ema.shadow_params[0]) == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_clipped_as_torch_clips_them(limit):
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    for model in models:
        for place, parameter in enumerate(model.parameters()):
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter) + place
    before = [parameter.grad.clone() for parameter in models[0].parameters()]
    training.clip_gradients(Accelerator(cpu=True), None, list(models[0].parameters()), limit)
    torch.nn.utils.clip_grad_norm_(models[1].parameters(), limit)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.equal(a.grad, b) for a, b in zip(models[0].parameters(), before, strict=True)) == (limit > 1)


def test_epochs_without_flags_have_the_guides_rhythm():
    plan, length, state = BatchPlan(4, 4, 1, 1, 0, seed=0), RunLength(40, None, 0.0), RunState()
    for kind, expected in ((VAEArguments, [20, 40]), (UNetArguments, [10, 20, 30, 40])):
        args = kind(epochs=40)
        assert [step for step in range(1, 41) if checkpoint_due(args, plan, RunState(step=step), length)] == expected
        assert [epoch for epoch in range(1, 41) if pictures_due(args, epoch, 1, length, state, [])] == [10, 20, 30, 40]


def test_of_long_epochs_no_more_than_ten_minutes_are_lost():
    length, plan, args = RunLength(10**6, None, 0.0, before=599.0), BatchPlan(10**6, 4, 1, 1, 0, seed=0), VAEArguments(epochs=4)
    assert checkpoint_due(args, plan, RunState(step=1, seconds=600.5), length)
    assert not checkpoint_due(args, plan, RunState(step=1, seconds=599.5), length)


@pytest.mark.parametrize(("began", "told"), [(-10, ""), (-200, "took 3.3 of the 10 minutes"), (-600, "start the same command again")])
def test_minutes_that_went_into_preparing_the_photos_are_told(began, told, monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    plan, args, state = BatchPlan(20, 4, 1, 1, 0, seed=0), VAEArguments(max_train_minutes=10), RunState()
    with pytest.raises(UserError, match=told) if began == -600 else nullcontext():
        length = RunLength.of(args, plan, Accelerator(cpu=True), state, began)
        assert length.began == began
        out = capsys.readouterr().out
        assert told in out
        assert bool(out) == bool(told)


def test_validation_takes_its_share_of_the_time_however_many_processes_there_are():
    args = VAEArguments(max_train_minutes=10)
    every = [epochs_between_validations(args, BatchPlan(100, 10 // n, 1, n, 0, seed=0), forward_passes=90) for n in (1, 2, 5)]
    assert every == [10, 20, 50], "each process validates all photos and trains on a part"


def test_a_run_that_has_checkpoints_only_is_not_begun_anew(tmp_path):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run: give --resume latest"):
        training.start_run(VAEArguments(output_dir=str(tmp_path), mixed_precision="no"))


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_model_that_was_downloaded_is_not_written_over(tmp_path, resume):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a model_index\.json that no run has written there: give another folder"):
        training.start_run(VAEArguments(output_dir=str(tmp_path), mixed_precision="no", resume=resume))
    assert [file.name for file in tmp_path.iterdir()] == ["model_index.json"]


def test_on_a_machine_with_a_gpu_the_launcher_may_ask_for_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = VAEArguments(output_dir=str(tmp_path))
    AcceleratorState._reset_state(True)
    assert training.start_run(args).device.type == "cpu"
    AcceleratorState._reset_state(True)
    assert args.mixed_precision != "fp16"


@pytest.mark.parametrize(
    ("compiled", "to_come", "expected"),
    [
        (0.05, 10_000, "50 ms a step in place of 100, after 60 s of compiling: won back after 1,200 of 10,000 steps"),
        (0.05, 1_000, "this run will not win that back, leave the flag out"),
        (0.11, 10_000, "110 ms a step in place of 100, after 60 s of compiling: this run will not win that back"),
    ],
)
def test_what_compiling_gains_is_told(compiled, to_come, expected):
    assert expected in training.compilation_report(0.1, compiled, 60.0, to_come)


class TwoLayers(torch.nn.Module):
    """Compiled, it is itself, or, where `broken`, as with a compiler that loses the first layer's gradients."""

    def __init__(self, broken):
        super().__init__()
        self.first, self.second, self.broken = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), broken
        torch.nn.init.constant_(self.second.weight, 9.0)

    def forward(self, values, lost=False):
        inner = self.first(values)
        return (self.second(inner.detach() if lost else inner),)

    def compile(self):
        self._compiled_call_impl = lambda values: self.forward(values, lost=self.broken)


@pytest.mark.parametrize(("broken", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_what_is_compiled_with_other_gradients_is_not_used(broken, dropout, capsys):
    """But with dropout, no two passes of which are alike, nothing can be said of gradients."""
    AcceleratorState._reset_state(True)
    model, state = TwoLayers(broken), RunState()
    model.dropout = torch.nn.Dropout(dropout)
    kept = not broken or dropout
    compilation = training.Compilation(SimpleNamespace(compile=True), Accelerator(cpu=True), model, state)
    for step in range(1, 44):
        assert (model._compiled_call_impl is not None) == (step > 13 and bool(kept))
        model(torch.randn(2, 4))[0].sum().backward()
        compilation.tick(step, steps_to_come=100)
    AcceleratorState._reset_state(True)
    told = capsys.readouterr().out
    assert ("the run goes on uncompiled" in told) == (not kept)
    assert ("ms a step in place of" in told) == bool(kept)


def test_a_resumed_run_is_compiled_after_its_first_step(capsys):
    AcceleratorState._reset_state(True)
    model = TwoLayers(broken=False)
    compilation = training.Compilation(SimpleNamespace(compile=True), Accelerator(cpu=True), model, RunState(step=20))
    model(torch.randn(2, 4))
    compilation.tick(21, steps_to_come=100)
    assert model._compiled_call_impl
    assert capsys.readouterr().out == ""
    AcceleratorState._reset_state(True)


def test_the_published_model_is_the_last_that_was_noted_as_such_or_the_best():
    history = [{"val_loss": loss, "epoch": epoch} for epoch, loss in enumerate((3.0, 1.0, 2.0))]
    assert best_record(history)["epoch"] == 1
    noted = [record | {"published": mark} for record, mark in zip(history, (1.0, 1.0, 0.0), strict=True)]
    assert best_record(noted)["epoch"] == 1
    assert best_record([*noted, {"val_loss": 1.2, "published": 1.0, "epoch": 3}])["epoch"] == 3


def test_early_stopping_by_patience_and_delta():
    state = RunState()
    for loss in (1.0, 0.9, 0.8999999, 0.9, 0.95):
        watch(state, loss, delta=1e-5)
    assert state.validations_waited == 3, "less than the delta lower is no progress"
    assert early_stop(state, 4, 0, 0.0) == ""
    assert "no lower loss in 3 validations" in early_stop(state, 3, 0, 0.0)
    assert early_stop(state, 0, 0, 0.0) == "", "0 never stops"


def test_early_stopping_by_oscillation():
    def after(losses):
        state = RunState()
        for loss in losses:
            watch(state, loss, window=10)
        return early_stop(state, 100, 10, 0.0005)

    assert "swings without falling" in after([0.5 + 0.01 * (-1) ** n for n in range(10)])
    assert after([0.5 + 0.01 * (-1) ** n for n in range(9)]) == "", "the window is not full"
    assert after([0.5 + 0.01 * (-1) ** n - 0.002 * n for n in range(10)]) == "", "it swings and falls"
    assert after([0.5 + 0.001 * n for n in range(10)]) == "", "it rises without swinging: that is for patience"


def test_metrics_survive_a_kill_in_mid_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (5, 10):
        append_metrics(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 1')
    assert [record["step"] for record in read_metrics(path)] == [5, 10]


def test_files_appear_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("killed_at", range(5))
def test_a_model_is_the_old_or_the_new_one_wherever_a_kill_cuts_its_publication(tmp_path, monkeypatch, killed_at):
    """Each rename may be the last thing that a run does: until the next run, never new weights under an old config."""
    for name in ("config.json", "weights", "more/weights"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    renames, original = [], os.replace

    def killing(source, target):
        if len(renames) == killed_at:
            raise KeyboardInterrupt
        renames.append(original(source, target))

    monkeypatch.setattr("os.replace", killing)
    try:
        with published_model(tmp_path) as folder:
            for name in ("config.json", "weights", "more/weights"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("new")
    except KeyboardInterrupt:
        assert killed_at < 4
    monkeypatch.undo()
    if (tmp_path / "config.json").is_file():
        assert len({(tmp_path / name).read_text() for name in ("config.json", "weights", "more/weights")}) == 1
    finish_publishing(tmp_path)
    contents = {(tmp_path / name).read_text() for name in ("config.json", "weights", "more/weights")}
    assert contents == ({"old"} if killed_at == 0 else {"new"})


def test_out_of_memory_names_the_flags_and_what_was_asked_for():
    args = VAEArguments(batch_size=16, image_size="128")
    with pytest.raises(
        UserError,
        match="--batch-size 16 at 128x128 px.* try --batch-size 8 --grad-accum 2 .* --gradient-checkpointing, or a smaller --image-size",
    ):
        with training.explained_failures(args):
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), training.explained_failures(args):
        raise RuntimeError("something else")


def test_what_accumulates_is_the_flag_whatever_the_launcher_asks_for(tmp_path, monkeypatch, capsys):
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
    assert "asks for 2 accumulated passes; --grad-accum 1 is what counts" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_ways_of_distributing_that_are_not_supported_are_refused(name, kind, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"accelerate launch: {kind} is not supported"):
        start_run(VAEArguments(output_dir=str(tmp_path / "run"), mixed_precision="no"))
    assert not (tmp_path / "run").exists()
