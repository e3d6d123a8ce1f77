"""The guide: which early weights it has, what is kept for it, and that a resumed run publishes the same."""

import shutil
from pathlib import Path

import torch
from conftest import UNET_CONFIG, run_here
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

import train_unet
from corel_diffusers import guide
from corel_diffusers.guide import guide_step, load_guide, save_snapshot, snapshot_due


def kept(run_dir: Path) -> list[str]:
    return sorted(file.name for file in (run_dir / "guides").iterdir())


def test_a_snapshot_near_an_eighth_of_any_step_was_due():
    for step in range(8, 5000):
        assert snapshot_due(guide_step(step))
        assert 2**-0.5 <= guide_step(step) / (step / 8) <= 2**0.5
    assert [step for step in range(1, 100) if snapshot_due(step)] == [1, 2, 4, 8, 16, 32, 64]
    assert guide_step(1) == 1


def test_what_any_checkpoint_may_still_ask_for_is_kept(tmp_path):
    unet = UNet2DModel.from_config(UNET_CONFIG | {"sample_size": 8}).to(memory_format=torch.channels_last)
    for step in (1, 2, 4, 8, 16, 32):
        save_snapshot(tmp_path, step, unet)
    assert len(kept(tmp_path)) == 6, "without a checkpoint the run may begin anew"
    for step in (40, 60):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    save_snapshot(tmp_path, 64, unet)
    assert kept(tmp_path) == [f"step-{step:06d}.safetensors" for step in (4, 8, 16, 32, 64)]

    assert load_guide(tmp_path, 60, unet, images_seen=guide.GUIDED_FROM - 1) is None
    assert load_guide(tmp_path, 10, unet, images_seen=guide.GUIDED_FROM) is None, "its snapshot is not there"
    loaded = load_guide(tmp_path, 60, unet, images_seen=guide.GUIDED_FROM)
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.state_dict().items())


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
    run_here("train_unet", [*flags, "--output-dir", cut, "--resume", cut / "checkpoints" / "step-000016"])
    for part in ("unet", "guide"):
        ours, theirs = (load_file(run / part / "diffusion_pytorch_model.safetensors") for run in (whole, cut))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
