"""Each loss term against its definition, and the parameters that it reaches."""

import pytest
import torch
from conftest import VAE_CONFIG
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from corel_diffusers.losses import (
    adaptive_weight,
    controlled_kl_weight,
    denoising_loss,
    discriminator_loss,
    kl_divergence,
    kl_warmup,
    log_normal_timesteps,
    min_snr_weight,
    prediction_target,
    reconstruction_loss,
    with_adversarial,
)
from corel_diffusers.models import VAEWithPosterior, build_discriminator, from_config
from corel_diffusers.perceptual import PerceptualLoss

ENCODER, DECODER = ("vae.encoder.", "vae.quant_conv."), ("vae.decoder.", "vae.post_quant_conv.")


def test_kl_is_torch_distributions():
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    expected = reference_kl(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(kl_divergence(mean, logvar), expected, rtol=1e-5)


def test_kl_warmup_rises_in_a_line():
    assert [kl_warmup(2.0, step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    assert kl_warmup(2.0, 0, 0) == 2.0


def test_controller_brings_a_responding_kl_to_its_target():
    """A posterior whose KL falls with the weight as KL = 3 / sqrt(w): the weight must end at (3 / target)^2."""
    weight = torch.tensor(1e-6)
    for _ in range(2000):
        weight = controlled_kl_weight(weight, 3 / weight.sqrt(), target=25.0)
    assert float(3 / weight.sqrt()) == pytest.approx(25.0, rel=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_the_scheduler_turns_back_into_the_clean_latents(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    latents, noise, timesteps = torch.randn(2, 4, 8, 8) * 3, torch.randn(2, 4, 8, 8), torch.tensor([250, 700])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = prediction_target(scheduler, latents, noise, timesteps)
    for place, timestep in enumerate(timesteps):
        row = slice(place, place + 1)
        recovered = scheduler.step(target[row], timestep, noisy[row]).pred_original_sample
        assert torch.allclose(recovered, latents[row], atol=1e-3)


def test_denoising_loss_is_the_mean_square_of_each_photo():
    a, b = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    assert torch.allclose(denoising_loss(a, b).mean(), torch.nn.functional.mse_loss(a, b))
    assert denoising_loss(a, b).shape == (3,)


@pytest.mark.parametrize(
    ("term", "reached", "untouched"),
    [("reconstruction", ENCODER + DECODER, ()), ("perceptual", ENCODER + DECODER, ()), ("kl", ENCODER, DECODER)],
)
def test_each_term_reaches_the_parameters_that_it_should_and_no_others(term, reached, untouched):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    model = VAEWithPosterior(from_config(AutoencoderKL, VAE_CONFIG | blocks, ""))
    perceptual = PerceptualLoss("efficientnet-lite0")
    photos = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction, mean, logvar, _ = model(photos, torch.randn(2, 4, 8, 8))
    loss = {
        "reconstruction": lambda: reconstruction_loss(reconstruction, photos, "l1"),
        "perceptual": lambda: perceptual(reconstruction, photos),
        "kl": lambda: kl_divergence(mean, logvar).mean(),
    }[term]()
    loss.backward()
    for name, parameter in model.named_parameters():
        grown = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert grown == name.startswith(reached), f"{term}: {name}"
        assert not (grown and name.startswith(untouched or ("none",)))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in perceptual.parameters())


def test_the_adversarial_terms_train_their_own_side_and_no_other():
    torch.manual_seed(0)
    decoder, discriminator = torch.nn.Conv2d(4, 3, 3, padding=1), build_discriminator(8)
    photo, latents = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 32, 32)
    reconstruction = decoder(latents)
    discriminator.requires_grad_(False)
    verdict = -discriminator(reconstruction).mean()
    discriminator.requires_grad_(True)
    _, towards = with_adversarial((reconstruction - photo).abs().mean(), verdict, 1.0, reconstruction, decoder, latents)
    towards.backward()
    assert all(p.grad is None for p in discriminator.parameters()), "the decoder's term must not train the discriminator"
    before = decoder.weight.grad.clone()
    assert before.abs().sum() > 0
    discriminator_loss(*discriminator(torch.cat([photo, reconstruction.detach()])).chunk(2)).backward()
    assert torch.equal(decoder.weight.grad, before), "the discriminator's term must not train the decoder"
    assert all(p.grad.abs().sum() > 0 for p in discriminator.parameters())


def test_both_terms_pull_alike_at_the_last_weights_and_the_gradient_is_their_sums():
    """As the paper has it: two more backward passes, to the weights themselves."""
    torch.manual_seed(0)
    first, decoder = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1)
    latents = torch.randn(2, 4, 8, 8)
    weights = [*first.parameters(), *decoder.parameters()]

    def terms():
        drawn_from = first(latents).sin()
        reconstruction = decoder(drawn_from)
        return (reconstruction**2).mean(), 7 * reconstruction.sin().mean(), reconstruction, drawn_from

    loss, adversarial, *_ = terms()
    pulls = [torch.autograd.grad(term, decoder.weight, retain_graph=True)[0].norm() for term in (loss, adversarial)]
    ratio = pulls[0] / (pulls[1] + 1e-4)
    expected = loss + 0.3 * ratio * adversarial
    gradients = torch.autograd.grad(expected, weights)
    for loss_scale in (1.0, torch.tensor(2.0**16)):
        loss, adversarial, reconstruction, drawn_from = terms()
        found, towards = with_adversarial(loss, adversarial, 0.3, reconstruction, decoder, drawn_from, loss_scale)
        assert float(found) == pytest.approx(float(expected.detach()), rel=1e-4)
        for value, wanted in zip(torch.autograd.grad(towards, weights), gradients, strict=True):
            assert torch.allclose(value, wanted, rtol=1e-3, atol=1e-6)
    loss, adversarial, reconstruction, drawn_from = terms()
    found, towards = with_adversarial(loss, float("inf") * adversarial, 0.3, reconstruction, decoder, drawn_from)
    assert not torch.isfinite(torch.autograd.grad(towards, weights)[0]).all(), "fp16 has overflowed: the scaler skips the step"
    pulls = torch.ones(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("inf"))
    assert adaptive_weight(*pulls, decoder, drawn_from) == 0
    assert not adaptive_weight(*pulls[:1] * 2, decoder, drawn_from).requires_grad


def test_the_discriminator_loss_is_the_hinge():
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert float(discriminator_loss(real, made)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_one_weight_on_the_loss_of_the_photo(kind):
    """Whatever is predicted, weight * loss is min(SNR, gamma) times the squared error of x_0."""
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    torch.manual_seed(0)
    photo, noise, timesteps = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.tensor([5, 100, 300, 500, 800, 990])
    target = prediction_target(scheduler, photo, noise, timesteps)
    prediction = target + 0.1 * torch.randn_like(target)
    noisy = scheduler.add_noise(photo, noise, timesteps)
    found = torch.stack([scheduler.step(prediction[i], int(t), noisy[i]).pred_original_sample for i, t in enumerate(timesteps)])
    snr = compute_snr(scheduler, timesteps)
    expected = snr.clamp(max=5) * (found - photo).square().flatten(1).mean(1)
    weighted = min_snr_weight(scheduler, timesteps, 5.0) * denoising_loss(prediction, target)
    assert torch.allclose(weighted, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_pure_noise_has_a_weight_where_sampling_begins_there(kind):
    scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    timesteps = torch.tensor([0, 500, 998, 999])
    snr = compute_snr(scheduler, timesteps)
    on_photo = min_snr_weight(scheduler, timesteps, 5.0) * (snr + 1 if kind == "v_prediction" else 1)
    assert torch.allclose(on_photo, snr.clamp(max=5) + 1, rtol=1e-4)
    assert float(on_photo[-1]) == pytest.approx(1, abs=1e-4)


def test_log_normal_timesteps_have_the_noise_levels_asked_for():
    scheduler = DDPMScheduler()
    timesteps = log_normal_timesteps(scheduler, torch.randn(20000, generator=torch.Generator().manual_seed(0)), -0.5, 0.7)
    levels = -0.5 * compute_snr(scheduler, timesteps).log()
    assert float(levels.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(levels.std()) == pytest.approx(0.7, abs=0.02)
    assert int(log_normal_timesteps(scheduler, torch.tensor([50.0]), 0, 1)) == 999
