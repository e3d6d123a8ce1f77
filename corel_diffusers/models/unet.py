"""Build the UNet2DModel."""

from typing import ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import nn

from corel_diffusers.models.configs import check_size, downsample_factor, from_config, load_config


def size_multiple(config: str, vae: AutoencoderKL) -> int:
    """Return the number of pixels that both sides of an image must be multiples of, for a UNet with this config.

    The VAE and the stages of the UNet halve the sides.
    """
    stages = len(load_config("unet", config).get("block_out_channels", (224, 448, 672, 896)))
    return downsample_factor(vae) * 2 ** (stages - 1)


def build_unet(
    config: str,
    size_px: tuple[int, int],
    vae: AutoencoderKL,
    num_classes: int | None = None,
    dropout: float | None = None,
    attention: str = "fused",
) -> UNet2DModel:
    """Return a UNet2DModel with random weights for the latents of `vae`.

    Args:
        config: "tiny", "base", "large", or a JSON file with a config of diffusers.
        size_px: (height, width) of the images in pixels.
        num_classes: number of classes; the label `num_classes` is then the null label. None: a model without classes.
        dropout: None: the value of the config.
        attention: the attention kernel in training: "fused" or "math".

    Raises:
        UserError: the config is not valid, or the size cannot be halved in all stages of the VAE and the UNet.
    """
    values = load_config("unet", config)
    factor = downsample_factor(vae)
    check_size(size_px, size_multiple(config, vae), "the VAE and the UNet")
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
    return from_config(UNet2DModel, values, config, attention)


def inner_stride(unet: UNet2DModel) -> int:
    """Return the size of the latents divided by the size of the features after the first up block of the UNet."""
    return 2 ** max(0, len(unet.config.block_out_channels) - 2)


class UNetForTraining(nn.Module):
    """A UNet2DModel with two modules that only training needs, `told` and `guess`. They are not saved with the UNet.

    `told` conditions the UNet on the crop parameters of its photo, so that samples do not look like augmented crops. It
    is a linear layer without bias. Its output is added to the time embedding (Karras et al. 2022, arXiv:2206.00364,
    appendix F.2). In sampling, all crop parameters are 0.

    `guess` predicts the features of the photo from the output of the UNet's first up block (see losses/alignment.py).

    Args:
        changes: number of crop parameters. 0: the UNet is not conditioned on them.
        features: number of features to predict. 0: no features are predicted.
    """

    ADAMW_LAYERS: ClassVar = ("conv_in", "conv_out", "class_embedding", "told", "guess")  # not for Muon
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
            predicted_features: (B, F, h', w'), h' = h / `inner_stride`; (B, 0, h, w) if no features are predicted.
        """
        self.changes = changes
        model_pred = self.unet(sample, timestep, labels if self.unet.class_embedding is not None else None).sample
        predicted_features = self.guess(self.inner) if self.guess else model_pred[:, :0]
        self.changes = self.inner = None
        return model_pred, predicted_features
