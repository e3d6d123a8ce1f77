"""Checkpoints are complete or absent, are refused if they belong to another run, and can be from an older version."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_run

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.files import UserError
from corel_diffusers.training import checkpoints
from corel_diffusers.training.checkpoints import Parts, Trained, find_checkpoints, read_state
from corel_diffusers.training.ema import build_ema
from corel_diffusers.training.learning_rate import LearningRate
from corel_diffusers.training.optimizers import CombinedOptimizer, build_optimizer, optimizer_step
from corel_diffusers.training.resume import newest_whole, refuse_pickles, resumed_checkpoint
from corel_diffusers.training.run_lock import LOCK, locked


def test_a_flag_added_after_the_run_began_counts_as_its_default(tmp_path):
    args = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny")
    args = args.resolved({})
    saved = json.loads(json.dumps(args.settings()))
    for name in ("dropout", "log_normal", "view_chance"):
        saved.pop(name)
    checkpoint = tmp_path / "checkpoints" / "step-000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved, "scaler": {}}))
    assert resumed_checkpoint(args, args.settings()) == checkpoint
    other = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny", dropout=0.1)
    other = other.resolved({})
    with pytest.raises(UserError, match=r"dropout was None, is 0.1"):
        resumed_checkpoint(other, other.settings())


def test_incomplete_checkpoints_are_not_found(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=2)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    trained = [Trained("model", *accelerator.prepare(model, optimizer))]
    rate = LearningRate([trained[0].optimizer], args)
    for step in (1, 2, 3):
        checkpoints.save(make_run(args, step), Parts(trained, rate, None))
    (tmp_path / "checkpoints" / ".step-000004.partial").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    (tmp_path / "checkpoints" / ".step-000001.removed").mkdir()
    checkpoints.save(make_run(args, 5), Parts(trained, rate, None))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000005"], (
        "incomplete checkpoints are removed"
    )
    assert {file.suffix for file in (tmp_path / "checkpoints").rglob("*.*") if file.is_file()} == {
        ".safetensors",
        ".json",
        ".jsonl",
    }, "no pickle"


def test_changed_settings_are_refused_and_listed(tmp_path):
    saved = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4).settings()
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved, "scaler": {}}))
    same = UNetArguments(
        output_dir=str(tmp_path),
        config="tiny",
        learning_rate=1e-4,
        epochs=900,
        early_stopping_patience=99,
        resume="latest",
    )
    assert resumed_checkpoint(same, same.settings()) == checkpoint
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    linked = UNetArguments(
        output_dir=str(tmp_path), config="tiny", learning_rate=1e-4, resume=str(tmp_path / "link" / "step-000001")
    )
    assert resumed_checkpoint(linked, linked.settings()) == checkpoint, (
        "a path through a link gives the checkpoint in the run folder"
    )
    other = UNetArguments(
        output_dir=str(tmp_path), config="tiny", learning_rate=2e-4, schedule="cosine", resume="latest"
    )
    with pytest.raises(UserError, match=r"learning-rate was 0.0001, is 0.0002; schedule was linear, is cosine"):
        resumed_checkpoint(other, other.settings())
    changed = same.settings() | {"photos": "others", "global_batch": 16}
    with pytest.raises(UserError, match=r"fewer devices\) was None, is 16; the photos have changed \(some were added"):
        resumed_checkpoint(same, changed)
    with pytest.raises(UserError, match=r"--resume elsewhere is not a checkpoint .* \(it has step-000001\)"):
        resumed_checkpoint(UNetArguments(output_dir=str(tmp_path), config="tiny", resume="elsewhere"), saved)


def test_a_resumed_run_has_the_same_optimizer_state(tmp_path):
    """The state of AdamW and Muon is restored in the memory layout of the weights.

    It is also restored from accelerate's own files, which older versions saved.
    """
    args = UNetArguments(output_dir=str(tmp_path), keep_checkpoints=0)
    accelerator = Accelerator(cpu=True, mixed_precision="no")

    def fresh() -> tuple[Trained, LearningRate]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8)).to(
            memory_format=torch.channels_last
        )
        part = Trained("model", *accelerator.prepare(model, build_optimizer("muon", model, 1e-3, 0.01, 2.0)))
        return part, LearningRate([part.optimizer], args)

    def train(part: Trained, steps: range) -> list[torch.Tensor]:
        for step in steps:
            part.model(
                torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            ).square().mean().backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
        return [weight.detach().clone() for weight in part.model.parameters()]

    part, rate = fresh()
    checkpoints.save(make_run(args), Parts([part], rate, None))
    assert not part.optimizer.state, "saving makes no optimizer step"
    checkpoints.load(make_run(args, checkpoint=find_checkpoints(tmp_path)[0]), Parts([part], rate, None))
    assert not part.optimizer.state, "loading makes no optimizer step"
    train(part, range(3))
    checkpoints.save(make_run(args, 3), Parts([part], rate, None))
    current = find_checkpoints(tmp_path)[-1]
    uninterrupted = train(part, range(3, 6))
    part, rate = fresh()
    checkpoints.load(make_run(args, 3, accelerator=accelerator, checkpoint=current), Parts([part], rate, None))
    assert all(map(torch.equal, train(part, range(3, 6)), uninterrupted))


def save_checkpoints(folder: Path, steps: range) -> None:
    """Save checkpoints of a small model at these steps."""
    args = VAEArguments(output_dir=str(folder), keep_checkpoints=0).resolved({"image_size": "32"})
    module = torch.nn.Linear(2, 2)
    part = Trained("model", module, torch.optim.AdamW(module.parameters()))
    for step in steps:
        checkpoints.save(make_run(args, step), Parts([part], LearningRate([part.optimizer], args), None))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(name, fault, tmp_path, capsys):
    save_checkpoints(tmp_path, range(1, 4))
    found = find_checkpoints(tmp_path)
    assert not any(map(checkpoints.damage, found))
    file = found[-1] / name
    content = bytearray(file.read_bytes())
    if fault == "flipped":
        content[len(content) // 2] ^= 0x10
    else:
        content = content[: {"truncated": len(content) // 2, "empty": 0, "missing": 0}[fault]]
    file.write_bytes(content)
    if fault == "missing":
        file.unlink()
    if (name, fault) == ("manifest.json", "missing"):
        return  # then it is a checkpoint of an earlier version
    assert newest_whole(tmp_path, found) == found[-2]
    printed = capsys.readouterr().out
    # a manifest with another number names the file that has this number
    assert f"notice: step-000003 is damaged ({'' if name == 'manifest.json' else name}" in printed
    for checkpoint in found[:-1]:
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
        newest_whole(tmp_path, found)


def test_a_checkpoint_of_pickles_is_refused_by_name(tmp_path):
    save_checkpoints(tmp_path, range(1, 2))
    (checkpoint,) = find_checkpoints(tmp_path)
    saved = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({name: v for name, v in saved.items() if name != "scaler"}))
    (checkpoint / "optimizer.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"has pickles \(optimizer.bin\), which are not loaded"):
        refuse_pickles(checkpoint)


@pytest.mark.parametrize("kind", ["weight", "second moment", "average"])
def test_values_that_are_not_finite_are_not_saved(kind, tmp_path):
    args = VAEArguments(output_dir=str(tmp_path)).resolved({"image_size": "32"})
    module = torch.nn.Linear(2, 2)
    part, ema = Trained("model", module, torch.optim.AdamW(module.parameters())), build_ema(args, module)
    module(torch.ones(1, 2)).sum().backward()
    part.optimizer.step()
    moment = part.optimizer.state[module.bias]["exp_avg_sq"]
    values = {"weight": module.bias.data, "second moment": moment, "average": ema.shadow_params[1]}[kind]
    values[1] = float("inf")
    with pytest.raises(UserError, match="is NaN or infinite at step 3, so no checkpoint is saved"):
        checkpoints.save(make_run(args, 3), Parts([part], LearningRate([part.optimizer], args), ema))
    assert not find_checkpoints(tmp_path)


def test_the_gradients_of_a_step_that_are_not_finite_are_skipped():
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    accelerator, before = Accelerator(cpu=True, mixed_precision="no"), module.weight.detach().clone()
    for value in (float("nan"), 1.0):
        module.weight.grad = torch.full((2, 2), value)
        module.bias.grad = torch.zeros(2)
        norm = optimizer_step(accelerator, optimizer, list(module.parameters()), 1.0)
        assert torch.equal(module.weight, before) == (value != 1.0)
        assert bool(norm.isfinite()) == (value == 1.0)


def test_a_step_is_skipped_if_only_the_gradients_of_the_discriminator_are_not_finite():
    module, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = CombinedOptimizer(*(torch.optim.AdamW(m.parameters(), lr=0.1) for m in (module, other)))
    accelerator, before = Accelerator(cpu=True, mixed_precision="no"), module.weight.detach().clone()
    for parameter in (*module.parameters(), *other.parameters()):
        parameter.grad = torch.ones_like(parameter)
    other.bias.grad[0] = float("inf")
    norm = optimizer_step(accelerator, optimizer, list(module.parameters()), 1.0, list(other.parameters()))
    assert not norm.isfinite()
    assert torch.equal(module.weight, before)
    assert not optimizer.parts[1].state


def test_only_one_living_run_holds_the_lock_of_a_folder(tmp_path):
    with locked(tmp_path, True):
        owner = json.loads((tmp_path / LOCK).read_text())
        with (
            pytest.raises(UserError, match=rf"is in use by another run, process {os.getpid()} on {owner['machine']}"),
            locked(tmp_path, True),
        ):
            pass
        with locked(tmp_path, False):  # the other ranks write nothing
            pass
    assert not (tmp_path / LOCK).exists()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [owner | {"process": ended.pid}, owner | {"started": owner["started"] - 60}, "half a"]
    for lock in dead:
        (tmp_path / LOCK).write_text(lock if isinstance(lock, str) else json.dumps(lock))
        os.utime(tmp_path / LOCK, (0, 0))
        with locked(tmp_path, True):
            pass
    elsewhere = tmp_path / LOCK
    elsewhere.write_text(json.dumps(owner | {"machine": "another"}))
    with pytest.raises(UserError, match="on another: wait for its end"), locked(tmp_path, True):
        pass
    os.utime(elsewhere, (0, 0))
    with locked(tmp_path, True):
        pass


def test_resuming_from_an_older_checkpoint_removes_the_newer_ones(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=0)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    module = torch.nn.Linear(2, 2)
    trained = [Trained("model", *accelerator.prepare(module, torch.optim.AdamW(module.parameters())))]
    rate = LearningRate([trained[0].optimizer], args)
    for step in (1, 2, 3):
        checkpoints.save(make_run(args, step), Parts(trained, rate, None))
    first = find_checkpoints(tmp_path)[0]
    saved = json.loads((first / "state.json").read_text())
    saved["state"]["given_up"] = True  # another version may have saved values that this one does not know
    (first / "state.json").write_text(json.dumps(saved))
    weights = first / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        checkpoints.load(make_run(args, checkpoint=first), Parts(trained, rate, None))
    assert len(find_checkpoints(tmp_path)) == 3, "if loading fails, no checkpoint is removed"
    (tmp_path / "elsewhere").rename(weights)
    assert read_state(first).step == 1
    checkpoints.load(make_run(args, 1, checkpoint=first), Parts(trained, rate, None))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000001"]


def test_a_changed_vae_config_is_refused_and_changed_arithmetic_is_reported(tmp_path, capsys):
    args = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4, resume="latest")
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    began = args.settings() | {"vae": "a", "vae_config": "b", "arithmetic": "sm90-tf32"}
    (checkpoint / "state.json").write_text(json.dumps({"settings": began, "scaler": {}}))
    with pytest.raises(UserError, match="the config of --vae-checkpoint has changed"):
        resumed_checkpoint(args, began | {"vae_config": "c"})
    assert resumed_checkpoint(args, began) == checkpoint
    assert "arithmetic" not in capsys.readouterr().out
    assert resumed_checkpoint(args, began | {"arithmetic": "avx512"}) == checkpoint
    assert (
        "notice: the arithmetic that computes the latents has changed (sm90-tf32 when the run began, avx512 now)"
        in capsys.readouterr().out
    )
    (checkpoint / "state.json").write_text(json.dumps({"settings": args.settings() | {"vae": "a"}, "scaler": {}}))
    assert resumed_checkpoint(args, began) == checkpoint, "older versions saved neither"


def test_only_the_files_of_a_checkpoint_are_flushed_to_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("all files of the machine were flushed"))
    original = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (flushed.append(os.readlink(f"/proc/self/fd/{number}")), original(number))
    )
    args, accelerator = VAEArguments(output_dir=str(tmp_path)), Accelerator(cpu=True, mixed_precision="no")
    module = torch.nn.Linear(2, 2)
    trained = [Trained("model", *accelerator.prepare(module, torch.optim.AdamW(module.parameters())))]
    checkpoints.save(make_run(args, 1), Parts(trained, LearningRate([trained[0].optimizer], args), None))
    names = [Path(path).name for path in flushed]
    assert set(names) == {
        "model.safetensors",
        "model_optimizer.safetensors",
        "state.json",
        "metrics.jsonl",
        "manifest.json",
        ".step-000001.partial",
        "checkpoints",
    }
    assert names[-1] == "checkpoints", "the folder with the new name is flushed last"
