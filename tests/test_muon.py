"""Muon is equal to torch.optim.Muon on matrices, and each parameter goes to the right optimizer."""

import copy

import pytest
import torch
from torch import nn

from corel_diffusers.models.vae import VAEWithPosterior, build_vae
from corel_diffusers.training.optimizers import Muon, build_optimizer, orthogonalize


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch 2.9 or newer")
def test_steps_on_matrices_are_equal_to_torch():
    torch.manual_seed(0)
    ours, reference = (nn.ParameterList([torch.ones(6, 10), torch.ones(12, 4)]) for _ in range(2))
    muon = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    torch_muon = torch.optim.Muon(reference, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, reference, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        torch_muon.step()
    for a, b in zip(ours, reference, strict=True):
        assert torch.allclose(a, b, atol=0.01), "not closer, because torch iterates in bfloat16"
        assert (a - b).abs().max() < 0.05 * (a - 1).abs().max()


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize([torch.randn(shape)])[0])
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_matrices_in_one_call_do_not_affect_each_other():
    torch.manual_seed(0)
    batches = [torch.randn(shape) for shape in ((3, 8, 20), (2, 30, 8), (1, 8, 8), (2, 4, 4))]
    for together, batch in zip(orthogonalize(batches), batches, strict=True):
        assert together.shape == batch.shape
        torch.testing.assert_close(together, orthogonalize([batch])[0])


def test_gram_matrices_are_multiplied_in_float32(monkeypatch):
    seen, eye = [], torch.eye
    monkeypatch.setattr(
        torch, "eye", lambda *a, **k: seen.append(torch.backends.cuda.matmul.allow_tf32) or eye(*a, **k)
    )
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        orthogonalize([torch.ones(1, 2, 3)])
        assert [*seen, torch.backends.cuda.matmul.allow_tf32] == [False, True]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_a_convolution_is_updated_like_its_matrix():
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
    assert torch.allclose(conv.flatten(1), matrix, atol=1e-6), "the memory layout must not change the result"


def test_first_and_last_layers_norms_and_biases_use_adamw():
    model = nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 8, 3),
            "middle": nn.Conv2d(8, 8, 3),
            "norm": nn.GroupNorm(2, 8),
            "conv_out": nn.Conv2d(8, 3, 3),
        }
    )
    muon, adamw = build_optimizer("muon", model, 1e-3, 0.0, 20, ("conv_in", "conv_out")).parts
    assert [p is model["middle"].weight for p in muon.param_groups[0]["params"]] == [True]
    assert sum(p.numel() for g in muon.param_groups + adamw.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    assert type(build_optimizer("adamw", model, 1e-3, 0.0, 20)) is torch.optim.AdamW


def test_scaled_gradients_give_the_same_step():
    """A gradient scaler on the CPU does the same as in fp16 on a GPU.

    It must unscale the gradients of both parts once, and count their steps as one.
    """

    def trained(scale: float | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_vae("tiny", (32, 32))
        optimizer = build_optimizer("muon", model, 1e-3, 0.01, 20, VAEWithPosterior.ADAMW_LAYERS)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(3):
            photos = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
            scaler.scale((model(photos).sample - photos).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scale is None or scaler.get_scale() == scale
        return [p.detach() for p in model.parameters()]

    for plain, scaled in zip(trained(None), trained(1024.0), strict=True):
        assert torch.allclose(plain, scaled, atol=1e-6)


def test_a_combined_optimizer_is_saved_and_loaded():
    torch.manual_seed(0)
    model = build_vae("tiny", (32, 32))
    optimizer = build_optimizer("muon", model, 1e-3, 0.01, 20, VAEWithPosterior.ADAMW_LAYERS)

    def step(optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 3, 32, 32)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(optimizer)
    weights, state = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    step(optimizer)
    expected = [p.detach().clone() for p in model.parameters()]
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    fresh = build_optimizer("muon", model, 5.0, 0.0, 20, VAEWithPosterior.ADAMW_LAYERS)
    fresh.load_state_dict(state)
    assert {group["lr"] for group in fresh.param_groups} == {1e-3, 20 * 1e-3}
    step(fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))
