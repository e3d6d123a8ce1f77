"""Gradients and weights that become NaN: the step is skipped, or the run goes back, or it stops with a reason."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from corel_diffusers.files import UserError
from corel_diffusers.losses.vae import controlled_kl_weight

pytestmark = pytest.mark.slow  # whole runs
LONG = ["--max-train-steps", 30, "--checkpoint-steps", 5, "--keep-checkpoints", 0, "--validate-every", 1]


class Poison:
    """Sets one value to NaN before the optimizer step number `step`: a gradient, a weight or the optimizer's state."""

    def __init__(self, kind: str, *steps: int) -> None:
        self.kind, self.steps, self.count = kind, steps, 0

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.count += 1
        if self.count not in self.steps:
            return
        weight = next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        state = next((value for value in optimizer.state[weight].values() if value.ndim), None)
        poisoned = {"gradient": weight.grad, "weight": weight.data, "state": state}[self.kind]
        poisoned[(0,) * poisoned.ndim] = math.nan

    def __enter__(self) -> "Poison":
        self.handle = register_optimizer_step_pre_hook(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def assert_finite(folder: Path) -> None:
    """Check each tensor of each safetensors file in a folder, and each number of metrics.jsonl."""
    files = list(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        assert all(value.isfinite().all() for value in load_file(file).values() if value.is_floating_point()), file
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values()), line


@pytest.mark.parametrize("kind", ["weight", "state"])
@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_the_run_goes_back_to_the_last_checkpoint(name, kind, vae_flags, unet_flags, tmp_path, capsys):
    flags = [*(vae_flags if name == "train_vae" else unet_flags), *LONG, "--optimizer", "adamw"]
    with Poison(kind, 13):
        run_here(name, [*flags, "--output-dir", tmp_path])
    output = capsys.readouterr().out
    assert "the run goes back to step 10, learning rate" in output
    assert_finite(tmp_path)
    state = json.loads((tmp_path / "checkpoints" / "step-000030" / "state.json").read_text())["state"]
    assert (state["returns"], state["step"]) == (1, 30)
    assert state["rate_factor"] == pytest.approx(1 / 3)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_run_that_diverges_three_times_stops_and_leaves_good_models(vae_flags, tmp_path):
    flags = [*vae_flags, *LONG, "--optimizer", "adamw", "--no-perceptual", "--output-dir", tmp_path]
    with (
        Poison("weight", 13, 23, 33),
        pytest.raises(UserError, match=r"for the third time, with a learning rate of .*: try"),
    ):
        run_here("train_vae", flags)
    assert_finite(tmp_path)


def test_a_run_without_a_checkpoint_stops_with_a_reason(vae_flags, tmp_path):
    with Poison("weight", 2), pytest.raises(UserError, match=r"NaN or infinite at step \d+: try --lr"):
        run_here("train_vae", [*vae_flags, "--max-train-steps", 30, "--no-perceptual", "--output-dir", tmp_path])


def test_the_kl_weight_stays_if_the_kl_is_nan():
    weight = torch.tensor(0.5)
    assert controlled_kl_weight(weight, torch.tensor(math.nan), 100.0) == weight
    assert controlled_kl_weight(weight, torch.tensor(200.0), 100.0) > weight
