"""Checkpoints: whole or not there, of this run or refused, of an older version too."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from corel_diffusers.arguments import UNetArguments, VAEArguments
from corel_diffusers.checkpoints import RunState, Trained, find_checkpoints, load_checkpoint, resumed_checkpoint, save_checkpoint
from corel_diffusers.files import UserError, write_json
from corel_diffusers.learning_rate import LearningRate
from corel_diffusers.muon import Together, build_optimizer


def test_a_flag_that_is_newer_than_the_run_counts_as_its_default(tmp_path):
    args = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny")
    args.fill({})
    saved = json.loads(json.dumps(args.settings()))
    for name in ("dropout", "log_normal", "view_chance"):
        saved.pop(name)
    checkpoint = tmp_path / "checkpoints" / "step-000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
    assert resumed_checkpoint(args, args.settings()) == checkpoint
    other = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny", dropout=0.1)
    other.fill({})
    with pytest.raises(UserError, match=r"dropout was None, is 0.1"):
        resumed_checkpoint(other, other.settings())


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=2)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    trained = [Trained("model", *accelerator.prepare(model, optimizer))]
    rate = LearningRate([trained[0].optimizer], args)
    for step in (1, 2, 3):
        save_checkpoint(accelerator, args, RunState(step=step), {}, trained, rate, None)
    (tmp_path / "checkpoints" / ".step-000004.partial").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    (tmp_path / "checkpoints" / ".step-000001.removed").mkdir()
    save_checkpoint(accelerator, args, RunState(step=5), {}, trained, rate, None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000005"], "no halves stay"
    assert {file.suffix for file in (tmp_path / "checkpoints").rglob("*.*") if file.is_file()} == {".safetensors", ".json"}, "no pickle"


def test_other_settings_are_refused_with_what_differs(tmp_path):
    saved = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4).settings()
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
    same = UNetArguments(
        output_dir=str(tmp_path), config="tiny", learning_rate=1e-4, epochs=900, early_stopping_patience=99, resume="latest"
    )
    assert resumed_checkpoint(same, same.settings()) == checkpoint
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    linked = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4, resume=str(tmp_path / "link" / "step-000001"))
    assert resumed_checkpoint(linked, linked.settings()) == checkpoint, "by its own name, which those beside it are found by"
    other = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=2e-4, schedule="cosine", resume="latest")
    with pytest.raises(UserError, match=r"learning-rate was 0.0001, is 0.0002; schedule was linear, is cosine"):
        resumed_checkpoint(other, other.settings())
    fewer = same.settings() | {"photos": "others", "global_batch": 16}
    with pytest.raises(
        UserError, match=r"--grad-accum makes up for fewer devices\) was None, is 16; the photos are others: some were added"
    ):
        resumed_checkpoint(same, fewer)
    with pytest.raises(UserError, match=r"--resume elsewhere is no checkpoint .* there are step-000001"):
        resumed_checkpoint(UNetArguments(output_dir=str(tmp_path), config="tiny", resume="elsewhere"), saved)


def test_the_optimizers_state_comes_back_as_it_was(tmp_path):
    """Of AdamW and of Muon beside it, in the weights' memory layout; also from what accelerate itself wrote, as an older version did."""
    args = UNetArguments(output_dir=str(tmp_path), keep_checkpoints=0)
    accelerator = Accelerator(cpu=True, mixed_precision="no")

    def fresh() -> tuple[Trained, LearningRate]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8)).to(memory_format=torch.channels_last)
        part = Trained("model", *accelerator.prepare(model, build_optimizer("muon", model, 1e-3, 0.01, 2.0)))
        return part, LearningRate([part.optimizer], args)

    def train(part: Trained, steps: range) -> list[torch.Tensor]:
        for step in steps:
            part.model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
        return [weight.detach().clone() for weight in part.model.parameters()]

    part, rate = fresh()
    save_checkpoint(accelerator, args, RunState(step=0), {}, [part], rate, None)
    assert not part.optimizer.state, "saving makes no step"
    load_checkpoint(accelerator, find_checkpoints(tmp_path)[0], [part], rate, None)
    assert not part.optimizer.state, "nor does loading"
    train(part, range(3))
    save_checkpoint(accelerator, args, RunState(step=3), {}, [part], rate, None)
    ours = find_checkpoints(tmp_path)[-1]
    older = ours.with_name("step-000004")
    accelerator._models, accelerator._optimizers = [part.model], [part.optimizer]
    accelerator.save_state(str(older))
    saved = json.loads((ours / "state.json").read_text())
    (older / "state.json").write_text(json.dumps({name: value for name, value in saved.items() if name != "scaler"}))
    uninterrupted = train(part, range(3, 6))
    for checkpoint in (older, ours):
        part, rate = fresh()
        accelerator._models, accelerator._optimizers = [part.model], [part.optimizer]
        load_checkpoint(accelerator, checkpoint, [part], rate, None)
        assert all(map(torch.equal, train(part, range(3, 6)), uninterrupted)), checkpoint.name


def test_older_checkpoints_of_two_models_are_read(tmp_path):
    """A VAE and its discriminator had an optimizer each, prepared by itself; one prepared optimizer now steps both."""
    args = VAEArguments(output_dir=str(tmp_path))
    accelerator = Accelerator(cpu=True, mixed_precision="no")

    def fresh() -> list[Trained]:
        modules = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        return [Trained(f"model_{i}", m, torch.optim.AdamW(m.parameters(), lr=1e-2)) for i, m in enumerate(modules)]

    trained = fresh()
    for part in trained:
        part.model(torch.ones(1, 2)).sum().backward()
        part.optimizer.step()
    accelerator._models, accelerator._optimizers = [part.model for part in trained], [part.optimizer for part in trained]
    older = tmp_path / "checkpoints" / "step-000001"
    accelerator.save_state(str(older))
    write_json(older / "state.json", {"state": {"step": 1}, "settings": {}, "learning_rate": {}})
    found = fresh()
    together = accelerator.prepare(Together(*(part.optimizer for part in found)))
    accelerator._models, accelerator._optimizers = [part.model for part in found], [together]
    load_checkpoint(accelerator, older, found, LearningRate([part.optimizer for part in found], args), None)
    assert accelerator._optimizers == [together]
    for part, was in zip(found, trained, strict=True):
        assert all(map(torch.equal, part.model.parameters(), was.model.parameters()))
        moments = [[state["exp_avg"] for state in each.optimizer.state.values()] for each in (part, was)]
        assert len(moments[0]) == 2
        assert all(map(torch.equal, *moments))


def test_going_back_to_an_older_checkpoint_drops_the_newer_ones(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=0)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    module = torch.nn.Linear(2, 2)
    trained = [Trained("model", *accelerator.prepare(module, torch.optim.AdamW(module.parameters())))]
    rate = LearningRate([trained[0].optimizer], args)
    for step in (1, 2, 3):
        save_checkpoint(accelerator, args, RunState(step=step), {}, trained, rate, None)
    first = find_checkpoints(tmp_path)[0]
    saved = json.loads((first / "state.json").read_text())
    saved["state"]["given_up"] = True  # as a version might write that still knew such a value
    (first / "state.json").write_text(json.dumps(saved))
    weights = first / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(accelerator, first, trained, rate, None)
    assert len(find_checkpoints(tmp_path)) == 3, "what cannot be gone back to costs nothing"
    (tmp_path / "elsewhere").rename(weights)
    assert load_checkpoint(accelerator, first, trained, rate, None).step == 1
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000001"]


def test_another_config_of_the_vae_is_refused_and_another_arithmetic_is_told(tmp_path, capsys):
    args = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4, resume="latest")
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    began = args.settings() | {"vae": "a", "vae_config": "b", "arithmetic": "sm90-tf32"}
    (checkpoint / "state.json").write_text(json.dumps({"settings": began}))
    with pytest.raises(UserError, match="the config of --vae-checkpoint is another"):
        resumed_checkpoint(args, began | {"vae_config": "c"})
    assert resumed_checkpoint(args, began) == checkpoint
    assert "notice" not in capsys.readouterr().out
    assert resumed_checkpoint(args, began | {"arithmetic": "avx512"}) == checkpoint
    assert "notice: latents are computed otherwise (sm90-tf32 when the run began, avx512 here)" in capsys.readouterr().out
    (checkpoint / "state.json").write_text(json.dumps({"settings": args.settings() | {"vae": "a"}}))
    assert resumed_checkpoint(args, began) == checkpoint, "an older version noted neither"


def test_a_checkpoint_is_flushed_by_itself_and_not_the_whole_machine(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("everything on the machine was flushed"))
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.append(os.readlink(f"/proc/self/fd/{number}")), original(number)))
    args, accelerator = VAEArguments(output_dir=str(tmp_path)), Accelerator(cpu=True, mixed_precision="no")
    module = torch.nn.Linear(2, 2)
    trained = [Trained("model", *accelerator.prepare(module, torch.optim.AdamW(module.parameters())))]
    save_checkpoint(accelerator, args, RunState(step=1), {}, trained, LearningRate([trained[0].optimizer], args), None)
    names = [Path(path).name for path in flushed]
    assert set(names) == {"model.safetensors", "model_optimizer.safetensors", "state.json", ".step-000001.partial", "checkpoints"}
    assert names[-1] == "checkpoints", "the new name last"
