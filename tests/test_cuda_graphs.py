"""Captured CUDA graphs give the same results as plain passes. All tests except the first one need a GPU."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import UNET_CONFIG, launch
from diffusers import UNet2DModel
from torch import nn

from corel_diffusers.models import layers
from corel_diffusers.models.configs import from_config
from corel_diffusers.models.unet import UNetForTraining
from corel_diffusers.runtime import cuda_graphs
from corel_diffusers.runtime.cuda_graphs import capture_if_faster

ARGS = SimpleNamespace(
    cuda_graphs=True, grad_accum=1, compile=False, gradient_checkpointing=False, aspect_buckets=False
)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="fp16" if torch.cuda.is_available() else "no")
    AcceleratorState._reset_state(True)


def batch(seed, device):
    generator = torch.Generator().manual_seed(seed)
    values = [
        torch.randn(4, 4, 8, 8, generator=generator),
        *torch.randint(3, (2, 4), generator=generator),
        torch.randn(4, 5, generator=generator),
    ]
    return [v.to(device) for v in values]


@pytest.fixture
def always_captured(monkeypatch):
    times = itertools.count(0, -1)
    monkeypatch.setattr(cuda_graphs, "seconds_per_pass", lambda *given: next(times))


def test_without_a_gpu_nothing_is_captured(accelerator):
    layer = nn.Linear(2, 2)
    assert capture_if_faster(ARGS, accelerator, "layer", layer, torch.zeros(1, 2)) is layer
    assert "forward" not in vars(layer)


@pytest.mark.gpu
@pytest.mark.parametrize(("classes", "num_parameters"), [(3, 5), (None, 0)])
def test_training_with_graphs_is_equal_to_plain_training(
    accelerator, always_captured, capsys, monkeypatch, classes, num_parameters
):
    """Train with dropout, fp16, gradient scaler and clipping, with and without conditioning on crop parameters.

    In evaluation mode, the model accepts batches of any size and uses its current weights.
    """
    monkeypatch.setattr(layers, "FROM_POSITIONS", 1)

    def train(replay):
        torch.manual_seed(0)
        sizes = {"in_channels": 4, "out_channels": 4, "num_class_embeds": classes, "sample_size": 8}
        model = UNetForTraining(
            from_config(UNet2DModel, UNET_CONFIG | sizes, ""), num_parameters, 7 if num_parameters else 0
        ).cuda()
        if replay:
            model = capture_if_faster(
                ARGS,
                accelerator,
                "UNet",
                model,
                *(v[:, :num_parameters] if v.ndim == 2 else v for v in batch(0, "cpu")),
            )
            assert "forward" in vars(model), capsys.readouterr().out
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
        losses = []
        for step in range(12):
            torch.cuda.manual_seed(step)
            latents, timesteps, labels, crop_parameters = batch(step, "cuda")
            with accelerator.autocast():
                model_pred, features = model(latents, timesteps, labels, crop_parameters[:, :num_parameters])
            loss = (model_pred - latents).square().mean() + features.square().sum() / 1000
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        model.eval()
        with torch.no_grad():
            model.unet.conv_out.bias.fill_(1.0)
            latents, timesteps, labels, crop_parameters = (v[:3] for v in batch(99, "cuda"))
            eval_pred = model(latents, timesteps, labels, crop_parameters[:, :num_parameters])[0]
        return losses, eval_pred

    (expected, expected_pred), (actual, actual_pred) = train(replay=False), train(replay=True)
    assert actual == pytest.approx(expected, rel=5e-3)
    assert actual[-1] < 0.98 * actual[0]
    assert torch.allclose(expected_pred, actual_pred, atol=0.05)


@pytest.mark.gpu
def test_a_captured_function_gives_gradients_of_its_input(accelerator, always_captured):
    weights = torch.randn(8, 8, device="cuda")
    function = lambda values, target: sum((values @ weights - target).square().mean() for _ in range(20))  # noqa: E731
    values = torch.randn(4, 8, device="cuda", requires_grad=True)
    target = torch.randn(4, 8, device="cuda")
    with torch.autocast("cuda", enabled=False):
        replayed = capture_if_faster(
            ARGS, accelerator, "loss", function, torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8)
        )
        assert replayed is not function
        expected, actual = function(values, target), replayed(values, target)
    gradients = [torch.autograd.grad(loss, values)[0] for loss in (expected, actual)]
    assert float(actual) == pytest.approx(float(expected), rel=1e-2)
    assert torch.allclose(*gradients, rtol=0.05, atol=0.05)


FAILING_SCRIPT = """
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from corel_diffusers.runtime.cuda_graphs import capture_if_faster

class DataDependent(torch.nn.Linear):
    def forward(self, values):
        return super().forward(values) * (1.0 if values.sum().item() > 0 else 2.0)

flags = {"grad_accum": 1, "compile": False, "gradient_checkpointing": False, "aspect_buckets": False}
args = SimpleNamespace(cuda_graphs=True, **flags)
capture_if_faster(args, Accelerator(), "layer", DataDependent(4, 4), torch.ones(2, 4))
"""


@pytest.mark.gpu
def test_a_model_that_cannot_be_captured_is_an_error_with_a_hint():
    # a new process, because CUDA cannot be used after the error
    done = launch(sys.executable, "-c", FAILING_SCRIPT, check=False)
    assert "UserError: the passes of the layer cannot be captured as CUDA graphs" in done.stderr
    assert "give --no-cuda-graphs" in done.stderr
