"""Each loss term is compared with its definition, and reaches only the parameters that it should train."""

import pytest
import torch
from conftest import VAE_CONFIG
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from corel_diffusers.losses.diffusion import denoising_loss, log_normal_timesteps, min_snr_weight, prediction_target
from corel_diffusers.losses.perceptual import PerceptualLoss
from corel_diffusers.losses.vae import (
    adaptive_weight,
    add_adversarial_loss,
    controlled_kl_weight,
    discriminator_loss,
    kl_divergence,
    kl_warmup,
    reconstruction_loss,
)
from corel_diffusers.models.configs import from_config
from corel_diffusers.models.discriminator import build_discriminator
from corel_diffusers.models.vae import VAEWithPosterior

ENCODER, DECODER = ("vae.encoder.", "vae.quant_conv."), ("vae.decoder.", "vae.post_quant_conv.")


def test_kl_divergence_equals_torch_distributions():
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    expected = reference_kl(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(kl_divergence(mean, logvar), expected, rtol=1e-5)


def test_kl_warmup_is_linear():
    assert [kl_warmup(2.0, step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    assert kl_warmup(2.0, 0, 0) == 2.0


def test_the_kl_controller_reaches_its_target():
    """The KL of this posterior depends on the weight: KL = 3 / sqrt(w). The weight must end at (3 / target)^2."""
    weight = torch.tensor(1e-6)
    for _ in range(2000):
        weight = controlled_kl_weight(weight, 3 / weight.sqrt(), target=25.0)
    assert float(3 / weight.sqrt()) == pytest.approx(25.0, rel=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_scheduler_recovers_the_clean_latents_from_the_target(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    latents, noise, timesteps = torch.randn(2, 4, 8, 8) * 3, torch.randn(2, 4, 8, 8), torch.tensor([250, 700])
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    target = prediction_target(scheduler, latents, noise, timesteps)
    for index, timestep in enumerate(timesteps):
        row = slice(index, index + 1)
        recovered = scheduler.step(target[row], timestep, noisy_latents[row]).pred_original_sample
        assert torch.allclose(recovered, latents[row], atol=1e-3)


def test_denoising_loss_is_the_mean_squared_error_of_each_photo():
    a, b = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    assert torch.allclose(denoising_loss(a, b).mean(), torch.nn.functional.mse_loss(a, b))
    assert denoising_loss(a, b).shape == (3,)


@pytest.mark.parametrize(
    ("term", "trained"),
    [("reconstruction", ENCODER + DECODER), ("perceptual", ENCODER + DECODER), ("kl", ENCODER)],
)
def test_each_term_trains_only_its_own_parameters(term, trained):
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
        has_grad = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has_grad == name.startswith(trained), f"{term}: {name}"
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in perceptual.parameters())


def test_each_adversarial_loss_trains_only_its_own_network():
    torch.manual_seed(0)
    decoder, discriminator = torch.nn.Conv2d(4, 3, 3, padding=1), build_discriminator(8)
    photos, latents = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 32, 32)
    reconstruction = decoder(latents)
    discriminator.requires_grad_(False)
    adversarial_loss = -discriminator(reconstruction).mean()
    discriminator.requires_grad_(True)
    _, backward_loss = add_adversarial_loss(
        (reconstruction - photos).abs().mean(), adversarial_loss, 1.0, reconstruction, decoder, latents
    )
    backward_loss.backward()
    assert all(p.grad is None for p in discriminator.parameters()), (
        "the loss of the decoder must not train the discriminator"
    )
    decoder_grad = decoder.weight.grad.clone()
    assert decoder_grad.abs().sum() > 0
    discriminator_loss(*discriminator(torch.cat([photos, reconstruction.detach()])).chunk(2)).backward()
    assert torch.equal(decoder.weight.grad, decoder_grad), "the loss of the discriminator must not train the decoder"
    assert all(p.grad.abs().sum() > 0 for p in discriminator.parameters())


def test_add_adversarial_loss_equals_the_definition_of_the_paper():
    """The reference computes the adaptive weight as in the paper, with one more backward pass per loss."""
    torch.manual_seed(0)
    first, decoder = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1)
    latents = torch.randn(2, 4, 8, 8)
    weights = [*first.parameters(), *decoder.parameters()]

    def terms():
        last_layer_input = first(latents).sin()
        reconstruction = decoder(last_layer_input)
        return (reconstruction**2).mean(), 7 * reconstruction.sin().mean(), reconstruction, last_layer_input

    loss, adversarial_loss, *_ = terms()
    norms = [
        torch.autograd.grad(term, decoder.weight, retain_graph=True)[0].norm() for term in (loss, adversarial_loss)
    ]
    ratio = norms[0] / (norms[1] + 1e-4)
    expected_loss = loss + 0.3 * ratio * adversarial_loss
    expected_gradients = torch.autograd.grad(expected_loss, weights)
    for loss_scale in (1.0, torch.tensor(2.0**16)):
        loss, adversarial_loss, reconstruction, last_layer_input = terms()
        total_loss, backward_loss = add_adversarial_loss(
            loss, adversarial_loss, 0.3, reconstruction, decoder, last_layer_input, loss_scale
        )
        assert float(total_loss) == pytest.approx(float(expected_loss.detach()), rel=1e-4)
        for gradient, expected in zip(torch.autograd.grad(backward_loss, weights), expected_gradients, strict=True):
            assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    loss, adversarial_loss, reconstruction, last_layer_input = terms()
    total_loss, backward_loss = add_adversarial_loss(
        loss, float("inf") * adversarial_loss, 0.3, reconstruction, decoder, last_layer_input
    )
    assert not torch.isfinite(torch.autograd.grad(backward_loss, weights)[0]).all(), (
        "after an overflow in fp16, the gradient must not be finite, so that the scaler skips the step"
    )
    gradients = torch.ones(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("inf"))
    assert adaptive_weight(*gradients, decoder, last_layer_input) == 0
    assert not adaptive_weight(*gradients[:1] * 2, decoder, last_layer_input).requires_grad


def test_the_discriminator_loss_is_the_hinge_loss():
    real_logits, fake_logits = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert float(discriminator_loss(real_logits, fake_logits)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_the_error_of_x_0_by_min_snr_gamma(prediction_type):
    """For each prediction type, weight * loss is min(SNR, gamma) times the squared error of x_0."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    torch.manual_seed(0)
    latents, noise, timesteps = (
        torch.randn(6, 4, 8, 8),
        torch.randn(6, 4, 8, 8),
        torch.tensor([5, 100, 300, 500, 800, 990]),
    )
    target = prediction_target(scheduler, latents, noise, timesteps)
    model_pred = target + 0.1 * torch.randn_like(target)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    predicted_latents = torch.stack(
        [scheduler.step(model_pred[i], int(t), noisy_latents[i]).pred_original_sample for i, t in enumerate(timesteps)]
    )
    snr = compute_snr(scheduler, timesteps)
    expected = snr.clamp(max=5) * (predicted_latents - latents).square().flatten(1).mean(1)
    weighted = min_snr_weight(scheduler, timesteps, 5.0) * denoising_loss(model_pred, target)
    assert torch.allclose(weighted, expected, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_with_zero_terminal_snr_pure_noise_has_a_weight_above_zero(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    timesteps = torch.tensor([0, 500, 998, 999])
    snr = compute_snr(scheduler, timesteps)
    x0_weight = min_snr_weight(scheduler, timesteps, 5.0) * (snr + 1 if prediction_type == "v_prediction" else 1)
    assert torch.allclose(x0_weight, snr.clamp(max=5) + 1, rtol=1e-4)
    assert float(x0_weight[-1]) == pytest.approx(1, abs=1e-4)


def test_log_normal_timesteps_have_the_requested_noise_levels():
    scheduler = DDPMScheduler()
    timesteps = log_normal_timesteps(
        scheduler, torch.randn(20000, generator=torch.Generator().manual_seed(0)), -0.5, 0.7
    )
    log_noise_levels = -0.5 * compute_snr(scheduler, timesteps).log()
    assert float(log_noise_levels.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(log_noise_levels.std()) == pytest.approx(0.7, abs=0.02)
    assert int(log_normal_timesteps(scheduler, torch.tensor([50.0]), 0, 1)) == 999
