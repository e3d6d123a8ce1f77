"""diffusers' layers, each the same function of the same weights, in fewer passes over memory: what models in training are made of.

Weights and configs are those of diffusers' own classes: what is saved loads without this file. On a small model a pass over memory costs as
much as a convolution.
"""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

BF16_LANES = 16  # what the CPU's kernels of GroupNorm go through at a time: fewer channels in a group, or a rest, are done one by one
FROM_POSITIONS = 1024  # of a batch: for fewer, summing up the kernel costs more than it saves


def quicken(model: nn.Module) -> None:
    """Has a diffusers model's layers computed as here, in place."""
    for part in model.modules():
        if type(part) is ResnetBlock2D and not (part.up or part.down or part.skip_time_act):
            part.__class__ = ResidualBlock
        elif type(part) is Upsample2D and part.use_conv:
            part.__class__ = Upsample
        elif type(part) is nn.GroupNorm:
            part.__class__ = GroupNorm
        elif type(part) is Attention and not torch.backends.cuda.flash_sdp_enabled():  # precision.use: not by the fused kernel
            part.set_processor(AttnProcessor())  # torch's own "math" also looks for rows that are masked altogether


class ResidualBlock(ResnetBlock2D):
    """Without a copy of the input to another memory format, and a division by 1."""

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (B, C, H, W), temb (B, T) -> (B, C', H, W)."""
        shortcut = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(self.nonlinearity(self.norm1(hidden)))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            time_scale, time_shift = temb.chunk(2, dim=1)
            hidden = torch.addcmul(time_shift, self.norm2(hidden), 1 + time_scale)
        else:
            hidden = self.norm2(hidden if temb is None else hidden + temb)
        hidden = shortcut + self.conv2(self.dropout(self.nonlinearity(hidden)))
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class Upsample(Upsample2D):
    """Each position repeated 2 x 2, then a 3 x 3 convolution, is one transposed convolution by the 4 x 4 sums of that kernel: 4 products an
    output in place of 9, and nothing enlarged to convolve. (On a GPU it was not measured, and is left as it is.)"""

    def forward(self, hidden: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """hidden (B, C, H, W) -> (B, C', 2H, 2W)."""
        positions = hidden.shape[0] * hidden.shape[2] * hidden.shape[3]
        if hidden.device.type != "cpu" or positions < FROM_POSITIONS or output_size is not None:
            return super().forward(hidden, output_size)
        padded = F.pad(self.conv.weight, (1, 1, 1, 1))
        kernel = sum(padded[..., top : top + 4, left : left + 4] for top in (0, 1) for left in (0, 1))
        made = F.conv_transpose2d(hidden, kernel.flip(-2, -1).transpose(0, 1), stride=2, padding=1)
        return made + self.conv.bias.to(made.dtype)[:, None, None]  # whose gradient takes longer than the rest within that operation


class GroupNorm(nn.GroupNorm):
    """In float32 where the CPU's kernel for bf16 and channels last is slow, at groups of few channels: a third to a half of the time."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        slow = values.dtype == torch.bfloat16 and values.device.type == "cpu" and (self.num_channels // self.num_groups) % BF16_LANES
        if slow and values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
            return super().forward(values.float()).to(values.dtype)
        return super().forward(values)
