"""Faster versions of diffusers layers for models in training. They compute the same functions with the same weights.

They make fewer passes over memory: in a small model, one pass over memory takes as long as a convolution. The weights,
their names and the configs stay those of diffusers, so a saved model loads without this file.
"""

import torch
from diffusers.models import resnet, upsampling
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from corel_diffusers.internals import set_class

# Number of channels that the CPU kernels of GroupNorm process at once. They process the channels of a smaller group,
# and the remaining channels of a larger group, one by one.
BF16_LANES = 16
# Upsample2D uses a transposed convolution for at least this many positions per batch. For fewer positions, a CPU needs
# more time to compute the kernel than it saves.
FROM_POSITIONS = 1024


def use_fast_layers(model: nn.Module, attention: str) -> None:
    """Replace the layers of an AutoencoderKL or UNet2DModel by the classes of this file, in place.

    Args:
        attention: "fused" or "math". On some CPUs, plain matrix products are faster in bf16 than fused attention.
    """
    for module in model.modules():
        if type(module) is resnet.ResnetBlock2D:
            set_class(module, ResnetBlock2D)
        elif type(module) is upsampling.Upsample2D and module.use_conv and torch.backends.mkldnn.is_available():
            set_class(module, Upsample2D)
        elif type(module) is nn.GroupNorm:
            set_class(module, GroupNorm)
        # AttnProcessor computes the same as the math kernel of torch, which also looks for rows that are completely
        # masked. That takes extra time.
        elif type(module) is Attention and attention == "math":
            module.set_processor(AttnProcessor())


class ResnetBlock2D(resnet.ResnetBlock2D):
    """ResnetBlock2D that does not copy the input of the shortcut to another memory format and does not divide by 1."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Return (B, C', H, W), or another size if the block changes it.

        Args:
            input_tensor: (B, C, H, W).
            temb: (B, T), the time embedding.
        """
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
    """Upsample2D as one transposed convolution.

    diffusers repeats each position 2 x 2 and then applies a 3 x 3 convolution. The result is the same as that of one
    transposed convolution with a 4 x 4 kernel, whose values are sums of values of the 3 x 3 kernel. It needs 4 products
    per output instead of 9, and it does not store the enlarged input.
    """

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the upsampled hidden states: (B, C, H, W) -> (B, C', 2H, 2W)."""
        positions = hidden_states.shape[0] * hidden_states.shape[2] * hidden_states.shape[3]
        # FSDP shards the weight and gathers it only when the module `conv` itself is called
        is_sharded = isinstance(self.conv.weight, DTensor)
        if positions < FROM_POSITIONS or output_size is not None or is_sharded:
            return super().forward(hidden_states, output_size)
        kernel = F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1, divisor_override=1)  # (C', C, 4, 4)
        output = F.conv_transpose2d(hidden_states, kernel.flip(-2, -1).transpose(0, 1), stride=2, padding=1)
        # As an argument of conv_transpose2d, the bias would have a gradient that takes longer than all the rest.
        return output + self.conv.bias.to(output.dtype)[:, None, None]


class GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in float32 where the CPU kernel for bf16 is slow.

    The kernel for bf16 and channels-last memory format is slow for groups of few channels. float32 is two to three
    times as fast there. The tensors that are kept for the backward pass take twice the memory.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalised hidden states (B, C, ...), with the same shape and dtype."""
        narrow = (self.num_channels // self.num_groups) % BF16_LANES != 0
        slow = narrow and hidden_states.dtype == torch.bfloat16 and hidden_states.device.type == "cpu"
        if slow and hidden_states.ndim == 4 and hidden_states.is_contiguous(memory_format=torch.channels_last):
            return super().forward(hidden_states.float()).to(hidden_states.dtype)
        return super().forward(hidden_states)
