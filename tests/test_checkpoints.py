"""Checkpoints are complete or absent, are refused if they belong to another run, and can be from an older version."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_run

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.files import UserError, write_json
from corel_diffusers.training import checkpoints
from corel_diffusers.training.checkpoints import Parts, Trained, find_checkpoints, read_state
from corel_diffusers.training.learning_rate import LearningRate
from corel_diffusers.training.optimizers import CombinedOptimizer, build_optimizer
from corel_diffusers.training.resume import resumed_checkpoint


def test_a_flag_added_after_the_run_began_counts_as_its_default(tmp_path):
    args = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny")
    args = args.resolved({})
    saved = json.loads(json.dumps(args.settings()))
    for name in ("dropout", "log_normal", "view_chance"):
        saved.pop(name)
    checkpoint = tmp_path / "checkpoints" / "step-000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
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
    }, "no pickle"


def test_changed_settings_are_refused_and_listed(tmp_path):
    saved = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4).settings()
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
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
    older = current.with_name("step-000004")
    accelerator._models, accelerator._optimizers = [part.model], [part.optimizer]
    accelerator.save_state(str(older))
    saved = json.loads((current / "state.json").read_text())
    (older / "state.json").write_text(json.dumps({name: value for name, value in saved.items() if name != "scaler"}))
    uninterrupted = train(part, range(3, 6))
    for checkpoint in (older, current):
        part, rate = fresh()
        accelerator._models, accelerator._optimizers = [part.model], [part.optimizer]
        checkpoints.load(make_run(args, 3, accelerator=accelerator, checkpoint=checkpoint), Parts([part], rate, None))
        assert all(map(torch.equal, train(part, range(3, 6)), uninterrupted)), checkpoint.name


def test_checkpoints_of_two_models_from_older_versions_are_read(tmp_path):
    """The VAE and its discriminator each had a prepared optimizer. Now one prepared optimizer steps both."""
    args = VAEArguments(output_dir=str(tmp_path))
    accelerator = Accelerator(cpu=True, mixed_precision="no")

    def untrained() -> list[Trained]:
        modules = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        return [Trained(f"model_{i}", m, torch.optim.AdamW(m.parameters(), lr=1e-2)) for i, m in enumerate(modules)]

    saved = untrained()
    for part in saved:
        part.model(torch.ones(1, 2)).sum().backward()
        part.optimizer.step()
    accelerator._models = [part.model for part in saved]
    accelerator._optimizers = [part.optimizer for part in saved]
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    accelerator.save_state(str(checkpoint))
    write_json(checkpoint / "state.json", {"state": {"step": 1}, "settings": {}, "learning_rate": {}})
    loaded = untrained()
    combined = accelerator.prepare(CombinedOptimizer(*(part.optimizer for part in loaded)))
    accelerator._models, accelerator._optimizers = [part.model for part in loaded], [combined]
    rate = LearningRate([part.optimizer for part in loaded], args)
    checkpoints.load(make_run(args, 1, accelerator=accelerator, checkpoint=checkpoint), Parts(loaded, rate, None))
    assert accelerator._optimizers == [combined]
    for part, expected in zip(loaded, saved, strict=True):
        assert all(map(torch.equal, part.model.parameters(), expected.model.parameters()))
        moments = [[state["exp_avg"] for state in each.optimizer.state.values()] for each in (part, expected)]
        assert len(moments[0]) == 2
        assert all(map(torch.equal, *moments))


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
    (checkpoint / "state.json").write_text(json.dumps({"settings": began}))
    with pytest.raises(UserError, match="the config of --vae-checkpoint has changed"):
        resumed_checkpoint(args, began | {"vae_config": "c"})
    assert resumed_checkpoint(args, began) == checkpoint
    assert "notice" not in capsys.readouterr().out
    assert resumed_checkpoint(args, began | {"arithmetic": "avx512"}) == checkpoint
    assert (
        "notice: the arithmetic that computes the latents has changed (sm90-tf32 when the run began, avx512 now)"
        in capsys.readouterr().out
    )
    (checkpoint / "state.json").write_text(json.dumps({"settings": args.settings() | {"vae": "a"}}))
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
        ".step-000001.partial",
        "checkpoints",
    }
    assert names[-1] == "checkpoints", "the folder with the new name is flushed last"
