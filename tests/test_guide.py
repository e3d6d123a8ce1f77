"""The guide model: its step, the snapshots that are kept for it, and equal results of a resumed run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNET_CONFIG, run_here
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from corel_diffusers.training import gauge, guide
from corel_diffusers.training.guide import Guide, guide_step


def snapshot_steps(run_dir: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("step-")) for file in (run_dir / "snapshots").iterdir())


@pytest.fixture
def unet() -> UNet2DModel:
    return UNet2DModel.from_config(UNET_CONFIG | {"sample_size": 8}).to(memory_format=torch.channels_last)


def test_every_saved_model_has_a_snapshot_for_its_guide_model(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(guide, "GUIDE_FROM_IMAGES", 1600)
    guide_models = Guide(tmp_path, unet, global_batch=16)
    for step in range(100, 5000):
        assert guide_models.due(guide_step(step))
        assert 2**-0.5 <= guide_step(step) / (step / 8) <= 2**0.5
    assert [step for step in range(1, 100) if guide_models.due(step)] == [16, 32, 64], "no model needs an earlier one"
    assert guide_step(1) == 1


def test_snapshots_that_a_checkpoint_can_still_need_are_kept(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(guide, "GUIDE_FROM_IMAGES", 20)
    guide_models = Guide(tmp_path, unet, global_batch=1)

    def keep(step: int) -> None:
        with torch.no_grad():
            unet.conv_in.bias.fill_(step)
        guide_models.keep(step)

    for step in (2, 4, 8, 16, 32):
        keep(step)
    assert snapshot_steps(tmp_path) == [2, 4, 8, 16, 32], "without a checkpoint, the run can start again"
    for step in (40, 60):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    keep(64)
    assert snapshot_steps(tmp_path) == [4, 8, 16, 32, 64]

    assert guide_models.of(19) is None, "too few images seen"
    assert guide_models.of(20) is None, "the snapshot of its guide model was removed"
    for step in (60, 90, 33):
        assert (guide_models.of(step).conv_in.bias == guide_step(step)).all()
    assert guide_models.of(60).state_dict().keys() == unet.state_dict().keys()


def test_the_guide_model_is_the_ema_of_an_eighth_of_the_steps_also_after_resume(unet_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(guide, "GUIDE_FROM_IMAGES", 64)
    monkeypatch.setattr(gauge, "SAVE_UP_TO_GAUGE", 9)  # any validation of this small run may be saved
    uninterrupted, resumed = tmp_path / "whole", tmp_path / "cut"
    flags = [
        *unet_flags,
        "--max-train-steps",
        32,
        "--validate-every",
        1,
        "--checkpoint-every",
        1,
        "--keep-checkpoints",
        0,
    ]
    run_here("train_unet", [*flags, "--output-dir", uninterrupted])
    pipe = DiffusionPipeline.from_pretrained(uninterrupted, trust_remote_code=True)
    average = load_file(uninterrupted / "checkpoints" / "step-000004" / "ema.safetensors")
    assert all(torch.equal(parameter, average[str(index)]) for index, parameter in enumerate(pipe.guide.parameters()))

    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "guide")
    for step in (8, 16, 32):
        (resumed / "snapshots" / f"step-{step:06d}.safetensors").unlink()
    run_here("train_unet", [*flags, "--output-dir", resumed, "--resume", resumed / "checkpoints" / "step-000004"])
    assert snapshot_steps(resumed) == snapshot_steps(uninterrupted) == [2, 4, 8, 16, 32]
    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "guide/diffusion_pytorch_model.safetensors",
        "snapshots/step-000016.safetensors",
    ):
        expected, actual = (load_file(run / file) for run in (uninterrupted, resumed))
        assert all(torch.equal(expected[name], actual[name]) for name in expected), file


def test_a_run_begun_without_guide_models_can_be_finished(unet_flags, tmp_path):
    """Its folder contains an older pipeline.py. The pipeline class there has no guide model."""
    flags = [*unet_flags, "--output-dir", tmp_path, "--epochs", 1]
    run_here("train_unet", flags)
    shutil.rmtree(tmp_path / "snapshots", ignore_errors=True)
    code, index = tmp_path / "pipeline.py", tmp_path / "model_index.json"
    for new, old in {
        "        guide: Optional[UNet2DModel] = None,  # noqa: UP045\n": "",
        ", guide=guide)": ")",
        "self.guide is not None": "False",
    }.items():
        assert new in code.read_text()
        code.write_text(code.read_text().replace(new, old))
    index.write_text(
        json.dumps({name: value for name, value in json.loads(index.read_text()).items() if name != "guide"})
    )
    (tmp_path / "grid.png").unlink()
    run_here("train_unet", [*flags, "--resume", "latest"])
    assert (tmp_path / "grid.png").is_file()
    assert json.loads((tmp_path / "run.json").read_text())["finished"]
