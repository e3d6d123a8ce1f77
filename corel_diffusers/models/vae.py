"""Build the AutoencoderKL."""

from typing import ClassVar

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from corel_diffusers.models.configs import check_size, from_config, load_config

# Initial log-variance of the posterior. At 0 the noise of the posterior hides the photo, and latent channels die before
# the decoder has learnt to use them.
INITIAL_LOGVAR = -4.0


def build_vae(
    config: str,
    size_px: tuple[int, int],
    latent_dim: int | None = None,
    downsample: int | None = None,
    attention: str = "fused",
    grey: bool = False,
) -> AutoencoderKL:
    """Return an AutoencoderKL with random weights.

    Its `scaling_factor` is 1. The scale of the latents is stored in `latents_mean` and `latents_std`, which are
    measured at the end of training.

    Args:
        config: "tiny", "base", "large", or a JSON file with a config of diffusers.
        size_px: (height, width) of the photos in pixels.
        latent_dim: number of latent channels. None: the value of the config.
        downsample: size of the photo / size of the latents: 4, 8 or 16. None: the value of the config. The factor is
            2^(stages - 1). For a smaller factor the last stages of the config are left out, for a larger factor its
            last stage is repeated.
        attention: the attention kernel in training: "fused" or "math".
        grey: build a VAE of grey photos, with one channel. Otherwise the number of channels is that of the config.

    Raises:
        UserError: the config is not valid, or the size is not a multiple of the downsampling factor.
    """
    values = load_config("vae", config)
    if grey:
        values |= {"in_channels": 1, "out_channels": 1}
    if latent_dim:
        values["latent_channels"] = latent_dim
    channels = list(values.get("block_out_channels", [64]))
    if downsample:
        stages = downsample.bit_length()
        channels = (channels + channels[-1:] * stages)[:stages]
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    values = (values | blocks) if downsample else (blocks | values)
    values |= {
        "block_out_channels": channels,
        "sample_size": size_px[0] if size_px[0] == size_px[1] else list(size_px),
        "scaling_factor": 1.0,
    }
    values.setdefault("force_upcast", False)
    check_size(size_px, 2 ** (len(channels) - 1), "the VAE")
    vae = from_config(AutoencoderKL, values, config, attention)
    start_posterior(vae)
    return vae


@torch.no_grad()
def start_posterior(vae: AutoencoderKL) -> None:
    """Initialise the 1x1 convolutions around the latents as the identity, and the log-variance with INITIAL_LOGVAR.

    A random matrix of this small size is often almost singular. Half of the latent channels are then hardly used.
    """
    for conv in (vae.quant_conv, vae.post_quant_conv):
        if conv is not None:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
    if vae.quant_conv is not None:
        vae.quant_conv.bias[vae.config.latent_channels :] = INITIAL_LOGVAR


def encode_photos(vae: AutoencoderKL, photos: torch.Tensor) -> DiagonalGaussianDistribution:
    """Return the posterior of photos (B, 3, H, W). A VAE of grey photos, with one channel, gets their first channel."""
    return vae.encode(photos[:, : vae.config.in_channels]).latent_dist


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) from latents (B, C, h, w). Grey images have three equal channels."""
    return vae.decode(latents).sample.expand(-1, 3, -1, -1)


class VAEWithPosterior(nn.Module):
    """An AutoencoderKL whose forward pass also returns the posterior and the input of the decoder's last layer.

    The losses need both, and `AutoencoderKL.forward` does not return them. This is a separate module so that DDP and
    autocast wrap the encoder and the decoder together.

    Args:
        adversarial: return the input of the decoder's last layer, which only the adversarial loss needs.
    """

    ADAMW_LAYERS: ClassVar = ("conv_in", "conv_out")  # not for Muon

    def __init__(self, vae: AutoencoderKL, adversarial: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.drawn_from: torch.Tensor | None = None  # input of the decoder's last layer, during a forward pass
        if adversarial:
            vae.decoder.conv_out.register_forward_pre_hook(self.keep_last_layer_input)

    def keep_last_layer_input(self, module: nn.Module, inputs: tuple) -> None:
        self.drawn_from = inputs[0].detach() if torch.is_grad_enabled() else None

    def forward(
        self, photos: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the reconstruction, the mean and the log-variance of the posterior, and the last layer's input.

        Args:
            photos: (B, 3, H, W).
            noise: (B, C, h, w), standard normal.

        Returns:
            reconstruction: (B, 3, H, W).
            mean, logvar: (B, C, h, w).
            last_layer_input: (B, D, H, W), the input of `decoder.conv_out`; (B, 0, H, W) without `adversarial`
                or without gradients.
        """
        posterior = encode_photos(self.vae, photos)
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        reconstruction = decode_latents(self.vae, latents)
        last_layer_input = photos[:, :0] if self.drawn_from is None else self.drawn_from
        self.drawn_from = None
        return reconstruction, posterior.mean, posterior.logvar, last_layer_input
