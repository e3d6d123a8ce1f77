"""FSDP: training, EMA, saving and resuming of a model sharded over two processes are equal to one process."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from conftest import ROOT, UNET_CONFIG, launch, make_run
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.files import UserError
from corel_diffusers.models import layers
from corel_diffusers.models.configs import from_config
from corel_diffusers.models.unet import UNetForTraining
from corel_diffusers.runtime.sharding import set_sharding

STEPS = 3
SHARDED = {"blocks": ["ResnetBlock2D"], "blocks-and-convolutions": ["ResnetBlock2D", "Conv2d"]}


def train_and_resume(folder: Path, sharded: list[str]) -> None:
    """Train a UNet, save a checkpoint, resume a new UNet from it, and save its full weights and EMA weights.

    sharded: names of the module classes that are sharded as units. The UNet itself is then one more unit. If the list
    is empty, nothing is sharded.
    """
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard

    from corel_diffusers.runtime.sharding import unsharded_copy
    from corel_diffusers.training import checkpoints
    from corel_diffusers.training.checkpoints import Parts, Trained, find_checkpoints, read_state
    from corel_diffusers.training.ema import build_ema, ema_weights
    from corel_diffusers.training.learning_rate import LearningRate

    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    args = UNetArguments(output_dir=str(folder))
    layers.FROM_POSITIONS = 1

    def build(seed: int):
        torch.manual_seed(seed)
        unet = from_config(
            UNet2DModel, UNET_CONFIG | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "dropout": 0.0}, ""
        )
        model = UNetForTraining(unet, 2, 0)
        full_copy = unsharded_copy(model, torch.device("cpu")) if sharded else None
        # reversed, so that inner modules are sharded first
        for part in reversed([module for module in model.modules() if type(module).__name__ in sharded]):
            fully_shard(part)
        model = fully_shard(model) if sharded else model
        # The gradient of the bias of attention keys is only rounding error. With AdamW's default eps, the steps of this
        # bias would be as large as those of other weights.
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4))
        return (
            model,
            full_copy,
            [Trained("model", model, optimizer)],
            build_ema(args, model),
            LearningRate([optimizer], args),
        )

    def train(model, optimizer, ema, steps: range) -> None:
        for step in steps:
            noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
            model(noise, torch.tensor([10, 900]), None, torch.ones(2, 2))[0].square().mean().backward()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(list(model.parameters()))

    model, full_copy, trained, ema, rate = build(0)
    train(model, trained[0].optimizer, ema, range(STEPS))
    checkpoints.save(make_run(args, STEPS, accelerator=accelerator), Parts(trained, rate, ema))
    model, full_copy, trained, ema, rate = build(1)
    checkpoint = find_checkpoints(folder)[-1]
    assert read_state(checkpoint).step == STEPS
    run = make_run(args, STEPS, accelerator=accelerator, checkpoint=checkpoint)
    checkpoints.load(run, Parts(trained, rate, ema))
    train(model, trained[0].optimizer, ema, range(STEPS, 2 * STEPS))
    for name, average in (("weights", None), ("averages", ema)):
        with ema_weights(average, model, full_copy):
            if accelerator.is_main_process:
                save_file(
                    {key: value.contiguous() for key, value in (full_copy or model).state_dict().items()},
                    folder / f"{name}.safetensors",
                )
    accelerator.wait_for_everyone()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot shard on a CPU: its streams have no events")
def test_two_sharded_processes_are_equal_to_one_process(tmp_path, monkeypatch):
    """Both ways of sharding run one after the other in the same two processes."""
    monkeypatch.setattr(layers, "FROM_POSITIONS", layers.FROM_POSITIONS)  # train_and_resume changes it
    AcceleratorState._reset_state(True)
    train_and_resume(tmp_path / "whole", sharded=[])
    env = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2]
    launch(sys.executable, *torchrun, Path(__file__), tmp_path, env=env)
    files = [f"checkpoints/step-{STEPS:06d}/{name}.safetensors" for name in ("model", "ema", "model_optimizer")]
    for file in ("weights.safetensors", "averages.safetensors", *files):
        expected = load_file(tmp_path / "whole" / file)
        for sharding in SHARDED:
            actual = load_file(tmp_path / sharding / file)
            assert expected.keys() == actual.keys(), f"{sharding}, {file}"
            for name in expected:
                close = torch.allclose(expected[name], actual[name], rtol=1e-3, atol=1e-5)
                assert close, f"{sharding}, {file}: {name}"


def test_each_block_is_sharded_in_float32_by_default():
    """accelerate's own default is one unit for the whole model and, with fp16, sums of the gradients in fp16."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("fp16")
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    set_sharding(accelerator, "adamw")
    model = UNetForTraining(from_config(UNet2DModel, UNET_CONFIG, ""), 0, 0)
    plugin.set_auto_wrap_policy(model)
    wrapped = {type(module) for module in model.modules() if fsdp2_prepare_auto_wrap_policy(plugin, model)(module)}
    assert wrapped == {layers.ResnetBlock2D}
    assert plugin.mixed_precision_policy is None
    with pytest.raises(UserError, match="--optimizer muon"):
        set_sharding(accelerator, "muon")
    accelerator.is_fsdp2 = False
    with pytest.raises(UserError, match="--fsdp_version 2"):
        set_sharding(accelerator, "adamw")


@pytest.mark.gpu
def test_fsdp_on_all_gpus_gives_the_losses_of_one_gpu(unet_flags, tmp_path):
    """The run is started as in docs/multi-gpu.md, and is resumed once."""
    count = torch.cuda.device_count()
    fsdp = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", 2, "--num_processes", count]
    common = [
        ROOT / "train_unet.py",
        *unet_flags,
        "--lr",
        1e-3,
        "--lr-scheduler",
        "none",
        "--dropout",
        0,
        "--output-dir",
    ]
    launch(sys.executable, *common, tmp_path / "one", "--epochs", 2, "--grad-accum", 2 * count)
    launch(sys.executable, *fsdp, *common, tmp_path / "parts", "--epochs", 1, "--grad-accum", 2)
    launch(sys.executable, *fsdp, *common, tmp_path / "parts", "--epochs", 2, "--grad-accum", 2, "--resume", "latest")
    expected, actual = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "parts")
    )
    assert [line["step"] for line in expected] == [line["step"] for line in actual]
    for a, b in zip(expected, actual, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=5e-3)


if __name__ == "__main__":
    for sharding, units in SHARDED.items():
        train_and_resume(Path(sys.argv[1]) / sharding, units)
    PartialState().destroy_process_group()
