"""The learning rates are equal to those of torch and diffusers."""

import json

import numpy as np
import pytest
import torch

from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.training.learning_rate import LearningRate, lr_factor


def lrs(scheduler, optimizer, steps):
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_learning_rates_are_equal_to_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=70, eta_min=1e-5)
    args = VAEArguments(learning_rate=2e-3, lr_scheduler="cosine", lr_min=1e-5, lr_warmup_steps=0)
    assert np.allclose([2e-3 * lr_factor(args, s, 70) for s in range(70)], lrs(cosine, optimizer, 70), rtol=1e-6)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2, eta_min=1e-5)
    args = VAEArguments(learning_rate=2e-3, lr_scheduler="cosine_warm_restarts", lr_min=1e-5, lr_warmup_steps=0)
    assert np.allclose([2e-3 * lr_factor(args, s, 70) for s in range(70)], lrs(restarts, optimizer, 70), rtol=1e-6)
    assert 2e-3 * lr_factor(args, 70, 70) == pytest.approx(1e-5), "the run ends at --lr-min"


@pytest.mark.parametrize(("rate", "lowest"), [(1e-3, 1e-5), (2e-5, 1e-5), (4.5e-6, 4.5e-7)])
def test_the_lowest_rate_is_below_the_learning_rate_of_any_fine_tuning(rate, lowest):
    assert VAEArguments(learning_rate=rate).resolved({"image_size": "32"}).lr_min == pytest.approx(lowest)


@pytest.mark.parametrize("name", ["linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"])
def test_diffusers_schedules_are_equal_to_diffusers(name):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    reference = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    args = VAEArguments(learning_rate=1e-3, lr_scheduler=name, lr_min=0, lr_warmup_steps=3)
    assert np.allclose([1e-3 * lr_factor(args, s, 20) for s in range(20)], lrs(reference, optimizer, 20))


def test_plateau_is_equal_to_torch_also_after_resume():
    def rate():
        args = VAEArguments(lr_scheduler="plateau", learning_rate=1e-3, lr_min=1e-5, lr_warmup_steps=0)
        return LearningRate([torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)], args)

    losses = [1.0, 0.5, *[0.6] * 14, *[0.4] * 13]
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    torch_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.5, patience=10, min_lr=1e-5)
    uninterrupted = rate()
    for loss in losses[:9]:
        uninterrupted.validated(loss)
        torch_scheduler.step(loss)
    resumed = rate()
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    for loss in losses[9:]:
        resumed.validated(loss)
        torch_scheduler.step(loss)
        resumed.set(0, 100)
        assert resumed.now == pytest.approx(reference.param_groups[0]["lr"])
    assert resumed.now == pytest.approx(2.5e-4)
