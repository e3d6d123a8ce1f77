"""Muon against torch's own, on the matrices that torch's takes, and what goes to which optimizer."""

import pytest
import torch
from torch import nn

from corel_diffusers.muon import Muon, build_optimizers, orthogonal


def test_steps_are_torchs_own_on_matrices():
    torch.manual_seed(0)
    ours, theirs = (nn.ParameterList([torch.ones(6, 10), torch.ones(12, 4)]) for _ in range(2))
    first = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    second = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=0.01), "torch iterates in bfloat16"
        assert (a - b).abs().max() < 0.05 * (a - 1).abs().max()


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_orthogonal_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_convolution_is_stepped_as_its_matrix():
    torch.manual_seed(0)
    conv, matrix = nn.Parameter(torch.zeros(8, 4, 3, 3)), nn.Parameter(torch.zeros(8, 36))
    conv.grad = torch.randn(8, 4, 3, 3)
    matrix.grad = conv.grad.flatten(1)
    Muon([conv], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    assert torch.allclose(conv.flatten(1), matrix, atol=1e-6)
    conv = nn.Parameter(torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last))
    conv.grad = matrix.grad.view(8, 4, 3, 3).to(memory_format=torch.channels_last)
    Muon([conv], lr=0.1).step()
    assert torch.allclose(conv.flatten(1), matrix, atol=1e-6), "the layout in memory must not matter"


def test_first_and_last_layers_norms_and_biases_stay_with_adamw():
    model = nn.ModuleDict(
        {"conv_in": nn.Conv2d(3, 8, 3), "middle": nn.Conv2d(8, 8, 3), "norm": nn.GroupNorm(2, 8), "conv_out": nn.Conv2d(8, 3, 3)}
    )
    muon, adamw = build_optimizers("muon", model, 1e-3, 0.0)
    assert [p is model["middle"].weight for p in muon.param_groups[0]["params"]] == [True]
    assert sum(p.numel() for g in muon.param_groups + adamw.param_groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    assert [type(o) for o in build_optimizers("adamw", model, 1e-3, 0.0)] == [torch.optim.AdamW]
