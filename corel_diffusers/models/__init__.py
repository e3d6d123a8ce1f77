"""Build AutoencoderKL and UNet2DModel from a preset (diffusers JSON in this folder) or from a JSON file of the user."""

from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import nn

from corel_diffusers.files import UserError, first_line, read_json
from corel_diffusers.models.layers import use_fast_layers

CONFIG_DIR = Path(__file__).parent
# Initial log-variance of the posterior. At 0 the noise of the posterior hides the photo, and latent channels die before
# the decoder has learnt to use them.
INITIAL_LOGVAR = -4.0


def load_config(kind: str, config: str) -> dict:
    """Return the config of a preset (`tiny`, `base`, `large`) or of a JSON file, without entries that start with "_".

    Args:
        kind: "vae" or "unet".

    Raises:
        UserError: the file does not contain a JSON object.
    """
    path = Path(config) if config.endswith(".json") else CONFIG_DIR / f"{kind}-{config}.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected one JSON object, as in a diffusers config.json")
    return {name: value for name, value in values.items() if not name.startswith("_")}


def from_config(model_class: type, values: dict, config: str) -> nn.Module:
    """Return a new model with random weights and with the layers of layers.py.

    Raises:
        UserError: `model_class` does not accept the values. The message names `config`.
    """
    try:
        model = model_class.from_config(values).to(memory_format=torch.channels_last)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"--config {config} is not a valid config of {model_class.__name__}: {first_line(error)}"
        ) from None
    use_fast_layers(model)
    # This adds the class name and the version to the config, as the first save would do. Compiled code checks the
    # config, so it must not change later.
    model.to_json_string()
    return model


def build_vae(
    config: str, size_px: tuple[int, int], latent_dim: int | None = None, downsample: int | None = None
) -> AutoencoderKL:
    """Return an AutoencoderKL with random weights.

    Its `scaling_factor` is 1. The scale of the latents is stored in `latents_mean` and `latents_std`, which are
    measured at the end of training.

    Args:
        latent_dim: number of latent channels. None: the value of the config.
        downsample: size of the photo / size of the latents: 4, 8 or 16. None: the value of the config. The factor is
            2^(stages - 1). For a smaller factor the last stages of the config are left out, for a larger factor its
            last stage is repeated.

    Raises:
        UserError: the config is not valid, or the size is not a multiple of the downsampling factor.
    """
    values = load_config("vae", config)
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
    vae = from_config(AutoencoderKL, values, config)
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


def build_unet(
    config: str, size_px: tuple[int, int], vae: AutoencoderKL, num_classes: int | None, dropout: float | None = None
) -> UNet2DModel:
    """Return a UNet2DModel with random weights for the latents of `vae`.

    Args:
        num_classes: number of classes; the label `num_classes` is then the null label. None: a model without classes.
        dropout: None: the value of the config.

    Raises:
        UserError: the config is not valid, or the size cannot be halved in all stages of the VAE and the UNet.
    """
    values = load_config("unet", config)
    factor = downsample_factor(vae)
    downsamples = len(values.get("block_out_channels", (224, 448, 672, 896))) - 1
    check_size(size_px, factor * 2**downsamples, "the VAE and the UNet")
    height, width = size_px[0] // factor, size_px[1] // factor
    values |= {
        "sample_size": height if height == width else [height, width],
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "num_class_embeds": num_classes + 1 if num_classes else None,
    }
    if dropout is not None:
        values["dropout"] = dropout
    # With resnet_time_scale_shift "scale_shift", UNet2DModel leaves out this norm. The activations of the attention
    # layer then grow until the gradients overflow.
    values.setdefault("attn_norm_num_groups", values.get("norm_num_groups", 32))
    return from_config(UNet2DModel, values, config)


def inner_grid(unet: UNet2DModel, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of the features after the first up block of the UNet, for latents of (h, w)."""
    downsamples = max(0, len(unet.config.block_out_channels) - 2)
    return latent_size[0] >> downsamples, latent_size[1] >> downsamples


def downsample_factor(vae: AutoencoderKL) -> int:
    """Return the number of pixels per latent position in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_size(size_px: tuple[int, int], multiple: int, model_name: str) -> None:
    """Check that both sides are multiples of `multiple`.

    Raises:
        UserError: they are not. The message names the model and the nearest valid sizes.
    """
    if any(side % multiple for side in size_px):

        def format_size(sides: list[int]) -> str:
            return str(sides[0]) if sides[0] == sides[1] else "x".join(map(str, sides))

        smaller = [max(side // multiple, 1) * multiple for side in size_px]
        larger = [-(-side // multiple) * multiple for side in size_px]
        nearest = " or ".join(dict.fromkeys((format_size(smaller), format_size(larger))))
        raise UserError(
            f"--image-size {format_size(list(size_px))}: "
            f"{model_name} can take multiples of {multiple} px: give {nearest}"
        )


class VAEWithPosterior(nn.Module):
    """An AutoencoderKL whose forward pass also returns the posterior and the input of the decoder's last layer.

    The losses need both, and `AutoencoderKL.forward` does not return them. This is a separate module so that DDP and
    autocast wrap the encoder and the decoder together.

    Args:
        adversarial: return the input of the decoder's last layer, which only the adversarial loss needs.
    """

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
        posterior = self.vae.encode(photos).latent_dist
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        reconstruction = self.vae.decode(latents).sample
        last_layer_input = photos[:, :0] if self.drawn_from is None else self.drawn_from
        self.drawn_from = None
        return reconstruction, posterior.mean, posterior.logvar, last_layer_input


class UNetForTraining(nn.Module):
    """A UNet2DModel with two modules that only training needs, `told` and `guess`. They are not saved with the UNet.

    `told` conditions the UNet on the crop parameters of its photo, so that samples do not look like augmented crops. It
    is a linear layer without bias. Its output is added to the time embedding (Karras et al. 2022, arXiv:2206.00364,
    appendix F.2). In sampling, all crop parameters are 0.

    `guess` predicts the features of the photo from the output of the UNet's first up block (see alignment.py).

    Args:
        changes: number of crop parameters. 0: the UNet is not conditioned on them.
        features: number of features to predict. 0: no features are predicted.
    """

    _no_split_modules: ClassVar = ["ResnetBlock2D"]  # FSDP gathers the weights of one such module at a time

    def __init__(self, unet: UNet2DModel, changes: int, features: int) -> None:
        super().__init__()
        self.unet = unet
        embedding_dim, channels = unet.time_embedding.linear_2.out_features, unet.config.block_out_channels[-1]
        self.told = nn.Linear(changes, embedding_dim, bias=False) if changes else None
        if self.told:
            nn.init.zeros_(self.told.weight)
        self.guess = (
            nn.Sequential(nn.Conv2d(channels, 256, 1), nn.SiLU(), nn.Conv2d(256, features, 1)) if features else None
        )
        # Both are set only during the forward pass of this module. The hooks do nothing if the UNet is called directly.
        self.changes: torch.Tensor | None = None  # crop parameters
        self.inner: torch.Tensor | None = None  # output of the first up block
        if self.told:
            unet.time_embedding.register_forward_hook(self.add_crop_embedding)
        if self.guess:
            unet.up_blocks[0].register_forward_hook(self.keep_inner)

    def add_crop_embedding(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output if self.changes is None else output + self.told(self.changes)

    def keep_inner(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.inner = output if self.changes is not None else None

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, changes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prediction of the UNet and the predicted features.

        Args:
            sample: (B, C, h, w), noisy latents.
            timestep: (B,).
            labels: (B,). A UNet without classes ignores them.
            changes: (B, number of crop parameters). All are 0 for a photo that is not augmented.

        Returns:
            model_pred: (B, C, h, w).
            predicted_features: (B, F, h', w'), see `inner_grid`; (B, 0, h, w) if no features are predicted.
        """
        self.changes = changes
        model_pred = self.unet(sample, timestep, labels if self.unet.class_embedding is not None else None).sample
        predicted_features = self.guess(self.inner) if self.guess else model_pred[:, :0]
        self.changes = self.inner = None
        return model_pred, predicted_features


def build_discriminator(width: int = 32) -> nn.Sequential:
    """Return a discriminator of images (B, 3, H, W).

    Its output is one logit per patch of 26 x 26 px, (B, 1, H/4, W/4). A logit above 0 means a real photo.

    It is a PatchGAN (Isola et al. 2017, arXiv:1611.07004, appendix 6.1.2) with fewer stages, because the images are
    small. It has GroupNorm, so that the logits of an image do not depend on the rest of the batch.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for channels, stride in ((width, 2), (2 * width, 1)):
        kernel = 4 if stride == 2 else 3
        layers += [
            nn.Conv2d(channels, 2 * channels, kernel, stride, 1),
            nn.GroupNorm(8, 2 * channels),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1)).to(memory_format=torch.channels_last)


def parameter_count(model: nn.Module) -> str:
    """Return the number of parameters as text, such as "12.3 M parameters"."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
