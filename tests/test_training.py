"""The pieces around the loops: order, randomness, learning rate, metrics, stopping, checkpoints."""

import json
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from corel_diffusers import training
from corel_diffusers.arguments import UNetArguments, VAEArguments
from corel_diffusers.files import UserError, best_record, finish_publishing, published_model, read_metrics, whole_file
from corel_diffusers.precision import autocast, resolve_precision
from corel_diffusers.training import (
    BatchPlan,
    RunLength,
    RunState,
    StepRandom,
    append_metrics,
    checkpoint_due,
    early_stop,
    epochs_between_validations,
    lr_factor,
    note_validation,
    pictures_due,
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


def test_epochs_without_flags_have_the_guides_rhythm():
    plan, length, state = BatchPlan(4, 4, 1, 1, 0, seed=0), RunLength(40, None, 0.0), RunState()
    for kind, expected in ((VAEArguments, [20, 40]), (UNetArguments, [10, 20, 30, 40])):
        args = kind(epochs=40)
        assert [step for step in range(1, 41) if checkpoint_due(args, plan, RunState(step=step), length)] == expected
        assert [epoch for epoch in range(1, 41) if pictures_due(args, epoch, 1, length, state, [])] == [10, 20, 30, 40]


def test_validation_takes_its_share_of_the_time_however_many_processes_there_are():
    args = VAEArguments(max_train_minutes=10)
    every = [epochs_between_validations(args, BatchPlan(100, 10 // n, 1, n, 0, seed=0), forward_passes=90) for n in (1, 2, 5)]
    assert every == [10, 20, 50], "each process validates all photos and trains on a part"


def test_a_run_that_has_checkpoints_only_is_not_begun_anew(tmp_path):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run: give --resume latest"):
        training.start_run(VAEArguments(output_dir=str(tmp_path), mixed_precision="no"))


def test_every_photo_is_seen_equally_often_in_a_new_order_each_epoch():
    plan = BatchPlan(photos=10, batch_size=4, grad_accum=1, num_processes=1, rank=0, seed=5)
    stream = np.concatenate([plan.indices(step, 0) for step in range(25)])
    assert (np.bincount(stream) == 10).all()
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:20])
    assert plan.steps_per_epoch == 3


@pytest.mark.parametrize(("batch_size", "grad_accum", "num_processes"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_the_global_batch_and_its_draws_do_not_depend_on_how_it_is_divided(batch_size, grad_accum, num_processes):
    whole = BatchPlan(11, 8, 1, 1, 0, seed=1)
    for step in (0, 3):
        indices, draws = np.zeros(8, int), torch.zeros(8, 2)
        for rank in range(num_processes):
            plan = BatchPlan(11, batch_size, grad_accum, num_processes, rank, seed=1)
            for micro in range(grad_accum):
                rows = plan.rows(micro)
                indices[rows] = plan.indices(step, micro)
                draws[rows] = StepRandom(1, step, plan.global_batch, rows).normal(2)
        assert (indices == whole.indices(step, 0)).all()
        assert torch.equal(draws, StepRandom(1, step, 8, slice(0, 8)).normal(2))


def test_arrays_that_stay_on_a_device_give_the_batches_of_those_on_the_disk():
    arrays = np.arange(11 * 4 * 3).reshape(11, 4, 3), np.broadcast_to(np.arange(11)[:, None], (11, 4))
    plan, length = BatchPlan(11, 2, 2, 2, 1, seed=1), training.RunLength(6, None, 0.0)
    versions = [np.random.default_rng(step).integers(4, size=8) for step in range(6)]
    read = [
        list(training.batches(plan, 2, length, workers, *kind, versions=versions.__getitem__))
        for kind, workers in ((arrays, 0), (arrays, 1), ([torch.from_numpy(array.copy()) for array in arrays], 0))
    ]
    assert len(read[0]) == 8, "two passes a step, from the third step on"
    for passes in zip(*read, strict=True):
        for tensors in zip(*passes, strict=True):
            assert torch.equal(tensors[0], tensors[1])
            assert torch.equal(tensors[0], tensors[2])
    rows, indices = plan.rows(1), plan.indices(3, 1)
    assert np.array_equal(read[0][3][0], arrays[0][indices, versions[3][rows]])
    assert np.array_equal(read[0][3][1], indices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_arrays_stay_on_a_gpu_that_has_room():
    values = np.arange(24).reshape(6, 2, 2)
    (kept,) = training.resident([values], torch.device("cuda"))
    assert kept.is_cuda
    assert np.array_equal(kept.cpu(), values)


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


def test_draws_differ_from_step_to_step_and_seed_to_seed():
    def first(seed, step):
        return float(StepRandom(seed, step, 1, slice(0, 1)).normal(1))

    assert len({first(seed, step) for seed in range(4) for step in range(4)}) == 16


def lrs(scheduler, optimizer, steps):
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_learning_rates_are_torchs_own():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=70, eta_min=1e-5)
    args = VAEArguments(learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=0)
    assert np.allclose([2e-3 * lr_factor(args, s, 70) for s in range(70)], lrs(cosine, optimizer, 70), rtol=1e-6)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2, eta_min=1e-5)
    args = VAEArguments(learning_rate=2e-3, lr_scheduler="cosine_warm_restarts", lr_warmup_steps=0)
    assert np.allclose([2e-3 * lr_factor(args, s, 70) for s in range(70)], lrs(restarts, optimizer, 70), rtol=1e-6)
    assert 2e-3 * lr_factor(args, 70, 70) == pytest.approx(1e-5), "the run ends at --lr-min"


@pytest.mark.parametrize("name", ["linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"])
def test_diffusers_names_give_diffusers_rates(name):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    reference = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    args = VAEArguments(learning_rate=1e-3, lr_scheduler=name, lr_warmup_steps=3)
    assert np.allclose([1e-3 * lr_factor(args, s, 20) for s in range(20)], lrs(reference, optimizer, 20))


def test_plateau_is_torchs_and_survives_a_resume():
    def rate():
        args = VAEArguments(lr_scheduler="plateau", learning_rate=1e-3, lr_warmup_steps=0)
        return training.LearningRate([torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)], args)

    losses = [1.0, 0.5, *[0.6] * 14, *[0.4] * 13]
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.5, patience=10, min_lr=1e-5)
    whole = rate()
    for loss in losses[:9]:
        whole.validated(loss)
        torchs.step(loss)
    resumed = rate()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for loss in losses[9:]:
        resumed.validated(loss)
        torchs.step(loss)
        resumed.set(0, 100)
        assert resumed.now == pytest.approx(reference.param_groups[0]["lr"])
    assert resumed.now == pytest.approx(2.5e-4)


def test_the_published_model_is_the_best_or_the_last_that_the_verdict_has_shaped():
    history = [{"val_loss": loss, "epoch": epoch} for epoch, loss in enumerate((3.0, 1.0, 2.0))]
    assert best_record(history)["epoch"] == 1
    shaped = [{"val_loss": loss, "adversarial": 0.1, "epoch": epoch} for epoch, loss in ((3, 1.2), (4, 1.5))]
    assert best_record([*history, *shaped])["epoch"] == 4


def test_early_stopping_by_patience_and_delta():
    state = RunState()
    for loss in (1.0, 0.9, 0.8999999, 0.9, 0.95):
        note_validation(state, loss, delta=1e-5)
    assert state.best == 0.8999999, "what is saved is the lowest; the delta only bears on patience"
    assert state.validations_since_best == 3
    assert early_stop(state, 4, 0, 0.0) == ""
    assert "no better validation loss in 3 validations" in early_stop(state, 3, 0, 0.0)
    assert early_stop(state, 0, 0, 0.0) == "", "0 never stops"


def test_early_stopping_by_oscillation():
    def after(losses):
        state = RunState()
        for loss in losses:
            note_validation(state, loss, window=10)
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


def test_fp16_without_a_gpu_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--mixed-precision fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")
    assert resolve_precision("auto", "cuda") == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        resolve_precision("auto", "cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_precision("auto", "cpu") == "bf16"


def test_a_flag_that_is_newer_than_the_run_counts_as_its_default(tmp_path):
    args = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny")
    args.fill({})
    saved = json.loads(json.dumps(args.settings()))
    for name in ("compile", "log_normal", "view_chance"):
        saved.pop(name)
    checkpoint = tmp_path / "checkpoints" / "step-000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
    assert training.find_resume(args, args.settings()) == checkpoint
    compiled = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny", compile=True)
    compiled.fill({})
    with pytest.raises(UserError, match="compile was False, is True"):
        training.find_resume(compiled, compiled.settings())


@pytest.mark.parametrize(("precision", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_matrix_product_runs_in_the_precision_asked_for(precision, expected):
    with autocast(precision, "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=2)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    rate = training.LearningRate([optimizer], args)
    for step in (1, 2, 3):
        training.save_checkpoint(accelerator, args, RunState(step=step), {}, rate, None)
    (tmp_path / "checkpoints" / ".step-000004.partial").mkdir()
    assert [path.name for path in training.find_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert not list((tmp_path / "checkpoints").rglob("custom_checkpoint*")), "nothing that accelerate would unpickle without a check"


def test_other_settings_are_refused_with_what_differs(tmp_path):
    saved = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4).settings()
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
    same = UNetArguments(
        output_dir=str(tmp_path), config="tiny", learning_rate=1e-4, epochs=900, early_stopping_patience=99, resume="latest"
    )
    assert training.find_resume(same, same.settings()) == checkpoint
    other = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=2e-4, schedule="cosine", resume="latest")
    with pytest.raises(UserError, match=r"learning-rate was 0.0001, is 0.0002; schedule was linear, is cosine"):
        training.find_resume(other, other.settings())
    with pytest.raises(UserError, match=r"--resume elsewhere is no checkpoint .* there are step-000001"):
        training.find_resume(UNetArguments(output_dir=str(tmp_path), config="tiny", resume="elsewhere"), saved)


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


def test_going_back_to_an_older_checkpoint_drops_the_newer_ones(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=0)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    module = torch.nn.Linear(2, 2)
    _, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    rate = training.LearningRate([optimizer], args)
    for step in (1, 2, 3):
        training.save_checkpoint(accelerator, args, RunState(step=step), {}, rate, None)
    first = training.find_checkpoints(tmp_path)[0]
    saved = json.loads((first / "state.json").read_text())
    saved["state"]["given_up"] = True  # as a version might write that still knew such a value
    (first / "state.json").write_text(json.dumps(saved))
    assert training.load_checkpoint(accelerator, first, rate, None).step == 1
    assert [path.name for path in training.find_checkpoints(tmp_path)] == ["step-000001"]


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
