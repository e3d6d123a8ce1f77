"""diffusers' layers, each the same function of the same weights, in fewer passes over memory: what models in training are made of.

On a small model a pass over memory costs as much as a convolution. Weights, names and configs stay diffusers' own: what is saved loads
without this file.
"""

import torch
from diffusers.models import resnet, upsampling
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

# what the CPU's kernels of GroupNorm go through at a time: a group of fewer channels, or a rest, is gone through one by one
BF16_LANES = 16
FROM_POSITIONS = 1024  # of a batch: for fewer, a CPU takes longer to sum up an enlarging kernel than it saves


def quicken(model: nn.Module) -> None:
    """Has the layers of an AutoencoderKL or UNet2DModel computed as here, in place."""
    for part in model.modules():
        if type(part) is resnet.ResnetBlock2D:
            part.__class__ = ResnetBlock2D
        elif type(part) is upsampling.Upsample2D and part.use_conv and torch.backends.mkldnn.is_available():
            part.__class__ = Upsample2D
        elif type(part) is nn.GroupNorm:
            part.__class__ = GroupNorm
        elif type(part) is Attention and not torch.backends.cuda.flash_sdp_enabled():  # precision.use chose the plain products
            part.set_processor(AttnProcessor())  # torch's own also look for rows that are masked altogether


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Without a copy of the shortcut's input to another memory format, and without a division by 1."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """input_tensor (B, C, H, W), temb (B, T) -> (B, C', H, W), or another size where the block changes it."""
        if self.up or self.down or self.skip_time_act:
            return super().forward(input_tensor, temb)
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            time_scale, time_shift = temb.chunk(2, dim=1)
            hidden = torch.addcmul(time_shift, self.norm2(hidden), 1 + time_scale)
        else:
            hidden = self.norm2(hidden if temb is None else hidden + temb)
        hidden = self.conv2(self.dropout(self.nonlinearity(hidden)))
        hidden = hidden + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class Upsample2D(upsampling.Upsample2D):
    """Each position repeated 2 x 2, then a 3 x 3 convolution, is one transposed convolution by the 4 x 4 sums of that kernel: 4 products an
    output in place of 9, and nothing enlarged to convolve."""

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """hidden_states (B, C, H, W) -> (B, C', 2H, 2W)."""
        positions = hidden_states.shape[0] * hidden_states.shape[2] * hidden_states.shape[3]
        cut = isinstance(self.conv.weight, DTensor)  # by FSDP, and put together when the convolution itself is called
        if positions < FROM_POSITIONS or output_size is not None or cut:
            return super().forward(hidden_states, output_size)
        sums = F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1, divisor_override=1)  # (C', C, 4, 4)
        made = F.conv_transpose2d(hidden_states, sums.flip(-2, -1).transpose(0, 1), stride=2, padding=1)
        return made + self.conv.bias.to(made.dtype)[:, None, None]  # within that operation its gradient takes longer than all the rest


class GroupNorm(nn.GroupNorm):
    """In float32 where the CPU's kernel for bf16 and channels last is slow, at groups of few channels: two to three times as fast, and what
    the backward pass needs takes twice the memory."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """values (B, C, ...) -> the same shape and type."""
        narrow = (self.num_channels // self.num_groups) % BF16_LANES != 0
        slow = narrow and values.dtype == torch.bfloat16 and values.device.type == "cpu"
        if slow and values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
            return super().forward(values.float()).to(values.dtype)
        return super().forward(values)
