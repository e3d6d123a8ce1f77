"""Passes that are replayed against the same passes as they are. All but the first test need a GPU."""

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

from corel_diffusers import cuda_graphs
from corel_diffusers.cuda_graphs import recorded
from corel_diffusers.models import UNetInTraining, from_config, layers

ARGS = SimpleNamespace(cuda_graphs=True, grad_accum=1, compile=False, gradient_checkpointing=False)


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
def recorded_whatever_it_takes(monkeypatch):
    times = itertools.count(0, -1)
    monkeypatch.setattr(cuda_graphs, "seconds_a_pass", lambda *given: next(times))


def test_without_a_gpu_nothing_is_recorded(accelerator):
    layer = nn.Linear(2, 2)
    assert recorded(ARGS, accelerator, "layer", layer, torch.zeros(1, 2)) is layer
    assert "forward" not in vars(layer)


@pytest.mark.gpu
@pytest.mark.parametrize(("classes", "told"), [(3, 5), (None, 0)])
def test_replayed_steps_train_as_plain_ones(accelerator, recorded_whatever_it_takes, capsys, monkeypatch, classes, told):
    """Dropout, fp16, its scaler and clipping; in evaluation mode batches of any size, with whatever the weights are then."""
    monkeypatch.setattr(layers, "FROM_POSITIONS", 1)

    def train(replay):
        torch.manual_seed(0)
        sizes = {"in_channels": 4, "out_channels": 4, "num_class_embeds": classes, "sample_size": 8}
        model = UNetInTraining(from_config(UNet2DModel, UNET_CONFIG | sizes, ""), told, 7 if told else 0).cuda()
        if replay:
            model = recorded(ARGS, accelerator, "UNet", model, *(v[:, :told] if v.ndim == 2 else v for v in batch(0, "cpu")))
            assert "forward" in vars(model), capsys.readouterr().out
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
        losses = []
        for step in range(12):
            torch.cuda.manual_seed(step)
            latents, timesteps, labels, changes = batch(step, "cuda")
            with accelerator.autocast():
                prediction, guess = model(latents, timesteps, labels, changes[:, :told])
            loss = (prediction - latents).square().mean() + guess.square().sum() / 1000
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        model.eval()
        with torch.no_grad():
            model.unet.conv_out.bias.fill_(1.0)
            latents, timesteps, labels, changes = (v[:3] for v in batch(99, "cuda"))
            shown = model(latents, timesteps, labels, changes[:, :told])[0]
        return losses, shown

    (expected, shown), (found, shown_too) = train(replay=False), train(replay=True)
    assert found == pytest.approx(expected, rel=5e-3)
    assert found[-1] < 0.98 * found[0]
    assert torch.allclose(shown, shown_too, atol=0.05)


@pytest.mark.gpu
def test_a_function_is_replayed_with_gradients_for_its_input(accelerator, recorded_whatever_it_takes):
    weights = torch.randn(8, 8, device="cuda")
    function = lambda values, target: sum((values @ weights - target).square().mean() for _ in range(20))  # noqa: E731
    values = torch.randn(4, 8, device="cuda", requires_grad=True)
    target = torch.randn(4, 8, device="cuda")
    with torch.autocast("cuda", enabled=False):
        replayed = recorded(ARGS, accelerator, "loss", function, torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8))
        assert replayed is not function
        expected, found = function(values, target), replayed(values, target)
    gradients = [torch.autograd.grad(loss, values)[0] for loss in (expected, found)]
    assert float(found) == pytest.approx(float(expected), rel=1e-2)
    assert torch.allclose(*gradients, rtol=0.05, atol=0.05)


ASKING = """
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from corel_diffusers.cuda_graphs import recorded

class Asking(torch.nn.Linear):
    def forward(self, values):
        return super().forward(values) * (1.0 if values.sum().item() > 0 else 2.0)

args = SimpleNamespace(cuda_graphs=True, grad_accum=1, compile=False, gradient_checkpointing=False)
recorded(args, Accelerator(), "layer", Asking(4, 4), torch.ones(2, 4))
"""


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_told_with_the_way_out():
    done = launch(sys.executable, "-c", ASKING, check=False)  # a process of its own: its CUDA is unfit afterwards
    assert "UserError: the layer's passes cannot be recorded as CUDA graphs" in done.stderr
    assert "give --no-cuda-graphs" in done.stderr
