"""Checkpoints: whole or not there, of this run or refused, of an older version too."""

import json

import pytest
import torch
from accelerate import Accelerator

from corel_diffusers.arguments import UNetArguments, VAEArguments
from corel_diffusers.checkpoints import RunState, find_checkpoints, find_resume, load_checkpoint, save_checkpoint
from corel_diffusers.files import UserError
from corel_diffusers.learning_rate import LearningRate


def test_a_flag_that_is_newer_than_the_run_counts_as_its_default(tmp_path):
    args = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny")
    args.fill({})
    saved = json.loads(json.dumps(args.settings()))
    for name in ("dropout", "log_normal", "view_chance"):
        saved.pop(name)
    checkpoint = tmp_path / "checkpoints" / "step-000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
    assert find_resume(args, args.settings()) == checkpoint
    other = UNetArguments(output_dir=str(tmp_path), resume="latest", config="tiny", dropout=0.1)
    other.fill({})
    with pytest.raises(UserError, match=r"dropout was None, is 0.1"):
        find_resume(other, other.settings())


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=2)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    rate = LearningRate([optimizer], args)
    for step in (1, 2, 3):
        save_checkpoint(accelerator, args, RunState(step=step), {}, rate, None)
    (tmp_path / "checkpoints" / ".step-000004.partial").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert not list((tmp_path / "checkpoints").rglob("custom_checkpoint*")), "nothing that accelerate would unpickle without a check"


def test_other_settings_are_refused_with_what_differs(tmp_path):
    saved = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=1e-4).settings()
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settings": saved}))
    same = UNetArguments(
        output_dir=str(tmp_path), config="tiny", learning_rate=1e-4, epochs=900, early_stopping_patience=99, resume="latest"
    )
    assert find_resume(same, same.settings()) == checkpoint
    other = UNetArguments(output_dir=str(tmp_path), config="tiny", learning_rate=2e-4, schedule="cosine", resume="latest")
    with pytest.raises(UserError, match=r"learning-rate was 0.0001, is 0.0002; schedule was linear, is cosine"):
        find_resume(other, other.settings())
    with pytest.raises(UserError, match=r"--resume elsewhere is no checkpoint .* there are step-000001"):
        find_resume(UNetArguments(output_dir=str(tmp_path), config="tiny", resume="elsewhere"), saved)


def test_going_back_to_an_older_checkpoint_drops_the_newer_ones(tmp_path):
    args = VAEArguments(output_dir=str(tmp_path), keep_checkpoints=0)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    module = torch.nn.Linear(2, 2)
    _, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    rate = LearningRate([optimizer], args)
    for step in (1, 2, 3):
        save_checkpoint(accelerator, args, RunState(step=step), {}, rate, None)
    first = find_checkpoints(tmp_path)[0]
    saved = json.loads((first / "state.json").read_text())
    saved["state"]["given_up"] = True  # as a version might write that still knew such a value
    (first / "state.json").write_text(json.dumps(saved))
    assert load_checkpoint(accelerator, first, rate, None).step == 1
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000001"]
