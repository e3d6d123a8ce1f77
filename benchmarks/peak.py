"""Which fraction of the machine's peak in convolutions and matrix products does a training step reach?

python benchmarks/peak.py --config tiny --image-size 64

Each convolution (with the upsampling before it) and each linear layer of the step is run alone, forward and backward,
at its shape and precision. The fastest run counts. The fraction is the sum of these times divided by the time of the
step. The remaining time is for norms, activations, attention and the optimizer. The benchmark runs on the CPU.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from common import machine_name
from torch.utils.flop_counter import FlopCounterMode

from corel_diffusers.losses.diffusion import denoising_loss
from corel_diffusers.models.configs import downsample_factor
from corel_diffusers.models.layers import Upsample2D
from corel_diffusers.models.unet import build_unet
from corel_diffusers.models.vae import VAEWithPosterior, build_vae
from corel_diffusers.runtime.precision import autocast, resolve_precision


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each call, after two warm-up calls."""
    run(), run()
    times = []
    for _ in range(repeats):
        start = time.monotonic()
        run()
        times.append(time.monotonic() - start)
    return times


def training_step(
    name: str, args: argparse.Namespace, precision: str, attention: str
) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Return the "VAE" or "UNet" and a function that runs its training step: forward, backward, fused AdamW."""
    size_px = (args.image_size, args.image_size)
    vae = build_vae(args.config, size_px, attention=attention)
    is_vae = name == "VAE"
    model = VAEWithPosterior(vae) if is_vae else build_unet(args.config, size_px, vae, 6, attention=attention)
    batch_size = args.vae_batch_size if is_vae else args.batch_size
    latents = torch.randn(batch_size, vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    photos = torch.rand(batch_size, 3, *size_px).to(memory_format=torch.channels_last)
    timesteps = torch.randint(1000, (batch_size,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with autocast(precision, "cpu"):
            if is_vae:
                loss = (model(photos, latents)[0].float() - photos).abs().mean()
            else:
                loss = denoising_loss(model(latents, timesteps, timesteps % 7).sample, latents).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def count_layers(model: torch.nn.Module, step: Callable[[], None]) -> Counter:
    """Run a step and count the calls of each convolution and linear layer: (layer, input shape) -> count.

    An Upsample2D counts as one convolution.
    """
    counts = Counter()

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        counts[layer, tuple(inputs[0].shape)] += 1

    inner_convolutions = [layer.conv for layer in model.modules() if isinstance(layer, Upsample2D)]
    kinds = torch.nn.Conv2d, torch.nn.Linear, Upsample2D
    layers = [layer for layer in model.modules() if isinstance(layer, kinds) and layer not in inner_convolutions]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    step()
    for hook in hooks:
        hook.remove()
    return counts


def layer_seconds(layer: torch.nn.Module, shape: tuple[int, ...], precision: str, repeats: int) -> float:
    """Return the minimum time of the layer's forward and backward pass, in seconds."""
    inputs = torch.randn(shape)
    inputs = (inputs.to(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs).requires_grad_()
    with autocast(precision, "cpu"):
        output_grad = torch.randn_like(layer(inputs))

    def run() -> None:
        with autocast(precision, "cpu"):
            layer(inputs).backward(output_grad)

    return min(seconds(run, repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="tiny, base or large")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vae-batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="time only the UNet's step, compiled; a compiled VAE may lose its gradients",
    )
    args = parser.parse_args()
    precision = resolve_precision("auto", "cpu")
    # 32 MB, freed at once, as in the training scripts. Afterwards glibc keeps most of the freed memory, so that the
    # system clears less memory again.
    torch.empty(2**23 - 2**12)
    print(f"{machine_name('cpu')}, mixed precision {precision}")
    for name in ["UNet"] if args.compile else ["VAE", "UNet"]:
        seconds_by_attention = {}
        for attention in ("fused", "math"):  # on a CPU with bf16, the training scripts use the faster one
            model, step = training_step(name, args, precision, attention)
            # The counter does not know the fused kernel. The reported count is therefore that of "math", the last one.
            with FlopCounterMode(display=False) as counter:
                step()
            layer_counts = count_layers(model, step)
            if args.compile:
                model.compile()
            seconds_by_attention[attention] = float(np.median(seconds(step, 4 * args.repeats)))
        attention, step_seconds = min(seconds_by_attention.items(), key=lambda item: item[1])
        layers_seconds = sum(
            count * layer_seconds(layer, shape, precision, args.repeats)
            for (layer, shape), count in layer_counts.items()
        )
        flops = counter.get_total_flops()
        print(
            f"| {name} step{', compiled' * args.compile}, {args.config}, {args.image_size} px, {attention} attention "
            f"| {1e3 * step_seconds:.3g} ms, {flops / step_seconds / 1e9:,.0f} GFLOP/s; its layers "
            f"alone {1e3 * layers_seconds:.3g} ms, {flops / layers_seconds / 1e9:,.0f} GFLOP/s "
            f"| {layers_seconds / step_seconds:.0%} of the peak |"
        )


if __name__ == "__main__":
    main()
