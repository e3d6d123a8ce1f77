"""The guide: which early weights it has, what is kept for it, and that a resumed run publishes and shows the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNET_CONFIG, run_here
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

import train_unet
from corel_diffusers import guide
from corel_diffusers.guide import Guide, guide_step


def kept(run_dir: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("step-")) for file in (run_dir / "snapshots").iterdir())


@pytest.fixture
def unet() -> UNet2DModel:
    return UNet2DModel.from_config(UNET_CONFIG | {"sample_size": 8}).to(memory_format=torch.channels_last)


def test_whatever_is_published_its_guide_was_kept(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(guide, "GUIDED_FROM", 1600)
    early = Guide(tmp_path, unet, global_batch=16)
    for step in range(100, 5000):
        assert early.due(guide_step(step))
        assert 2**-0.5 <= guide_step(step) / (step / 8) <= 2**0.5
    assert [step for step in range(1, 100) if early.due(step)] == [16, 32, 64], "no run asks for an earlier one"
    assert guide_step(1) == 1


def test_what_any_checkpoint_may_still_ask_for_stays(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(guide, "GUIDED_FROM", 20)
    early = Guide(tmp_path, unet, global_batch=1)

    def keep(step: int) -> None:
        with torch.no_grad():
            unet.conv_in.bias.fill_(step)
        early.keep(step)

    for step in (2, 4, 8, 16, 32):
        keep(step)
    assert kept(tmp_path) == [2, 4, 8, 16, 32], "without a checkpoint the run may begin anew"
    for step in (40, 60):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    keep(64)
    assert kept(tmp_path) == [4, 8, 16, 32, 64]

    assert early.of(19) is None, "too few pictures"
    assert early.of(20) is None, "its snapshot is not there"
    for step in (60, 90, 33):
        assert (early.of(step).conv_in.bias == guide_step(step)).all()
    assert early.of(60).state_dict().keys() == unet.state_dict().keys()


def test_a_run_is_guided_by_its_own_average_of_an_eighth_of_its_steps_resumed_or_not(unet_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(guide, "GUIDED_FROM", 64)
    monkeypatch.setattr(train_unet, "PUBLISHED_UP_TO", 9)  # the last validation, whatever so small a run has learned
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*unet_flags, "--max-train-steps", 32, "--validate-every", 1, "--checkpoint-every", 1, "--keep-checkpoints", 0]
    run_here("train_unet", [*flags, "--output-dir", whole])
    pipe = DiffusionPipeline.from_pretrained(whole, trust_remote_code=True)
    average = load_file(whole / "checkpoints" / "step-000004" / "ema.safetensors")
    assert all(torch.equal(parameter, average[str(place)]) for place, parameter in enumerate(pipe.guide.parameters()))

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "guide")
    for step in (8, 16, 32):
        (cut / "snapshots" / f"step-{step:06d}.safetensors").unlink()
    run_here("train_unet", [*flags, "--output-dir", cut, "--resume", cut / "checkpoints" / "step-000004"])
    assert kept(cut) == kept(whole) == [2, 4, 8, 16, 32]
    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "guide/diffusion_pytorch_model.safetensors",
        "snapshots/step-000016.safetensors",
    ):
        ours, theirs = (load_file(run / file) for run in (whole, cut))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


def test_a_run_begun_before_there_were_guides_comes_to_its_end(unet_flags, tmp_path):
    """Its folder holds the pipeline.py of its time, whose class takes none."""
    flags = [*unet_flags, "--output-dir", tmp_path, "--epochs", 1]
    run_here("train_unet", flags)
    shutil.rmtree(tmp_path / "snapshots", ignore_errors=True)
    code, index = tmp_path / "pipeline.py", tmp_path / "model_index.json"
    for new, old in {
        "        guide: UNet2DModel | None = None,\n": "",
        ", guide=guide)": ")",
        "self.guide is not None": "False",
    }.items():
        assert new in code.read_text()
        code.write_text(code.read_text().replace(new, old))
    index.write_text(json.dumps({name: value for name, value in json.loads(index.read_text()).items() if name != "guide"}))
    (tmp_path / "grid.png").unlink()
    run_here("train_unet", [*flags, "--resume", "latest"])
    assert (tmp_path / "grid.png").is_file()
    assert json.loads((tmp_path / "run.json").read_text())["finished"]
