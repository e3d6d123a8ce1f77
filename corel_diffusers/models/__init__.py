"""Models from configs: presets (diffusers JSON beside this file) or a user's own JSON -> AutoencoderKL, UNet2DModel."""

from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import nn

from corel_diffusers.files import UserError, first_line, read_json
from corel_diffusers.models.layers import quicken

HERE = Path(__file__).parent
INITIAL_LOGVAR = -4.0  # of the posterior: at 0 its noise drowns the photo, and channels die before the decoder has learnt to use them


def load_config(kind: str, config: str) -> dict:
    """The config of a preset (`tiny`, `base`, `large`) or of a JSON file. kind: "vae" or "unet"."""
    path = Path(config) if config.endswith(".json") else HERE / f"{kind}-{config}.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected one JSON object, as in a diffusers config.json")
    return {name: value for name, value in values.items() if not name.startswith("_")}


def from_config(model: type, values: dict, config: str) -> nn.Module:
    """A model with fresh weights, of the layers in layers.py; what its class refuses is the config's fault and named so."""
    try:
        built = model.from_config(values).to(memory_format=torch.channels_last)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"--config {config} makes no {model.__name__}: {first_line(error)}") from None
    quicken(built)
    built.to_json_string()  # writes class and version into its config, as the first saving would: what is compiled looks at that
    return built


def build_vae(config: str, size_px: tuple[int, int], latent_dim: int | None = None, downsample: int | None = None) -> AutoencoderKL:
    """An AutoencoderKL with fresh weights. latent_dim: latent channels. downsample: 4, 8 or 16.

    The factor is 2^(stages - 1): a smaller one leaves out the config's last stages, a larger one repeats its last.
    `scaling_factor` is 1: the scale of the latents is `latents_mean` and `latents_std`, measured when training ends.
    """
    values = load_config("vae", config)
    if latent_dim:
        values["latent_channels"] = latent_dim
    channels = list(values.get("block_out_channels", [64]))
    if downsample:
        stages = downsample.bit_length()
        channels = (channels + channels[-1:] * stages)[:stages]
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * len(channels), "up_block_types": ["UpDecoderBlock2D"] * len(channels)}
    values = (values | blocks) if downsample else (blocks | values)
    values |= {
        "block_out_channels": channels,
        "sample_size": size_px[0] if size_px[0] == size_px[1] else list(size_px),
        "scaling_factor": 1.0,
    }
    values.setdefault("force_upcast", False)
    check_size(size_px, 2 ** (len(channels) - 1), "the VAE")
    vae = from_config(AutoencoderKL, values, config)
    start_posterior(vae)
    return vae


@torch.no_grad()
def start_posterior(vae: AutoencoderKL) -> None:
    """The 1x1 convolutions round the latents start as the identity, and the posterior's log variance at INITIAL_LOGVAR.

    Drawn at random, so small a matrix is near singular often enough that half of the channels starve.
    """
    for conv in (vae.quant_conv, vae.post_quant_conv):
        if conv is not None:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
    if vae.quant_conv is not None:
        vae.quant_conv.bias[vae.config.latent_channels :] = INITIAL_LOGVAR


def build_unet(
    config: str, size_px: tuple[int, int], vae: AutoencoderKL, num_classes: int | None, dropout: float | None = None
) -> UNet2DModel:
    """A UNet2DModel with fresh weights for the latents of `vae`; label `num_classes` is the null label. dropout: None for the config's."""
    values = load_config("unet", config)
    factor = downsample_factor(vae)
    halvings = len(values.get("block_out_channels", (224, 448, 672, 896))) - 1
    check_size(size_px, factor * 2**halvings, "the VAE and the UNet")
    height, width = size_px[0] // factor, size_px[1] // factor
    values |= {
        "sample_size": height if height == width else [height, width],
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "num_class_embeds": num_classes + 1 if num_classes else None,
    }
    if dropout is not None:
        values["dropout"] = dropout
    # with time as a scale and shift, UNet2DModel leaves this norm out: activations grow there until gradients overflow
    values.setdefault("attn_norm_num_groups", values.get("norm_num_groups", 32))
    return from_config(UNet2DModel, values, config)


def inner_grid(unet: UNet2DModel, latent_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the features after the UNet's first stage up, for latents of (h, w)."""
    halvings = max(0, len(unet.config.block_out_channels) - 2)
    return latent_size[0] >> halvings, latent_size[1] >> halvings


def downsample_factor(vae: AutoencoderKL) -> int:
    """Pixels a latent position, in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_size(size_px: tuple[int, int], multiple: int, who: str) -> None:
    """Refuses a size that is no multiple, with the nearest ones that are."""
    if any(side % multiple for side in size_px):

        def text(sides: list[int]) -> str:
            return str(sides[0]) if sides[0] == sides[1] else "x".join(map(str, sides))

        smaller = [max(side // multiple, 1) * multiple for side in size_px]
        larger = [-(-side // multiple) * multiple for side in size_px]
        nearest = " or ".join(dict.fromkeys((text(smaller), text(larger))))
        raise UserError(f"--image-size {text(list(size_px))}: {who} can take multiples of {multiple} px: give {nearest}")


class VAEWithPosterior(nn.Module):
    """AutoencoderKL whose forward pass also returns what losses need and `AutoencoderKL.forward` hides: the posterior, and what the
    decoder's last layer was given.

    A module of its own, so that DDP and autocast wrap encoding and decoding together.
    """

    def __init__(self, vae: AutoencoderKL, adversarial: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.drawn_from: torch.Tensor | None = None  # of the pass that is under way
        if adversarial:
            vae.decoder.conv_out.register_forward_pre_hook(self.keep)

    def keep(self, module: nn.Module, inputs: tuple) -> None:
        self.drawn_from = inputs[0].detach() if torch.is_grad_enabled() else None

    def forward(self, photos: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """photos (B, 3, H, W), noise (B, C, h, w) -> reconstruction (B, 3, H, W), mean and log-variance (B, C, h, w), what
        `decoder.conv_out` made the reconstruction of (B, D, H, W), which only an adversarial loss needs: without one (B, 0, H, W)."""
        posterior = self.vae.encode(photos).latent_dist
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        reconstruction = self.vae.decode(latents).sample
        drawn_from = photos[:, :0] if self.drawn_from is None else self.drawn_from
        self.drawn_from = None
        return reconstruction, posterior.mean, posterior.logvar, drawn_from


class UNetInTraining(nn.Module):
    """A UNet2DModel with what only training needs, and what stays behind when the UNet is saved.

    It is told how its photo was changed, so that it does not draw changed photos: a linear map of the changes, without bias, is
    added to the time's embedding (Karras et al. 2022, arXiv:2206.00364, appendix F.2); at sampling nothing is changed. And it
    guesses a photo's features from its own after the first stage up (see alignment.py). 0 changes or features: without that part.
    """

    _no_split_modules: ClassVar = ["ResnetBlock2D"]  # what FSDP puts together from its parts at a time

    def __init__(self, unet: UNet2DModel, changes: int, features: int) -> None:
        super().__init__()
        self.unet = unet
        width, channels = unet.time_embedding.linear_2.out_features, unet.config.block_out_channels[-1]
        self.told = nn.Linear(changes, width, bias=False) if changes else None
        if self.told:
            nn.init.zeros_(self.told.weight)
        self.guess = nn.Sequential(nn.Conv2d(channels, 256, 1), nn.SiLU(), nn.Conv2d(256, features, 1)) if features else None
        self.changes: torch.Tensor | None = None  # of the pass that is under way; the UNet by itself is told of none
        self.inner: torch.Tensor | None = None
        if self.told:
            unet.time_embedding.register_forward_hook(self.tell)
        if self.guess:
            unet.up_blocks[0].register_forward_hook(self.keep)

    def tell(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output if self.changes is None else output + self.told(self.changes)

    def keep(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.inner = output if self.changes is not None else None

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, changes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """labels (B,), which a UNet without classes does not look at; changes (B, changes), zero for none -> the UNet's prediction
        (B, C, h, w) and the features it guesses (B, F, h', w')."""
        self.changes = changes
        prediction = self.unet(sample, timestep, labels if self.unet.class_embedding is not None else None).sample
        guess = self.guess(self.inner) if self.guess else prediction[:, :0]
        self.changes = self.inner = None
        return prediction, guess


def build_discriminator(width: int = 32) -> nn.Sequential:
    """Pictures (B, 3, H, W) -> a verdict on each patch of 26 x 26 px, (B, 1, H/4, W/4): above 0 is real.

    PatchGAN (Isola et al. 2017, arXiv:1611.07004, appendix 6.1.2) with fewer stages, for small pictures, and GroupNorm, whose
    verdict on a picture does not depend on the batch.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for channels, stride in ((width, 2), (2 * width, 1)):
        kernel = 4 if stride == 2 else 3
        layers += [nn.Conv2d(channels, 2 * channels, kernel, stride, 1), nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1)).to(memory_format=torch.channels_last)


def parameter_count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
