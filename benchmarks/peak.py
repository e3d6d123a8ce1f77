"""What share of what this machine can do in convolutions and matrix products does a training step reach?

python benchmarks/peak.py --config tiny --image-size 64

Every convolution (with the enlarging before it) and linear layer of the step is run by itself, forward and backward, at its shape and
precision, as fast as the machine does it; their sum over the step's time is the share. What is left is norms, activations, attention and
the optimizer. On the CPU.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from common import machine
from torch.utils.flop_counter import FlopCounterMode

from corel_diffusers.losses import denoising_loss
from corel_diffusers.models import VAEWithPosterior, build_unet, build_vae, downsample_factor
from corel_diffusers.models.layers import Upsample2D
from corel_diffusers.precision import autocast, resolve_precision


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    run(), run()
    found = []
    for _ in range(repeats):
        began = time.monotonic()
        run()
        found.append(time.monotonic() - began)
    return found


def training_step(name: str, args: argparse.Namespace, precision: str) -> tuple[torch.nn.Module, Callable[[], None]]:
    """The "VAE" or "UNet", and a training step of it: forward, backward, fused AdamW."""
    size_px = (args.image_size, args.image_size)
    vae = build_vae(args.config, size_px)
    model = VAEWithPosterior(vae) if name == "VAE" else build_unet(args.config, size_px, vae, 6)
    batch_size = args.vae_batch_size if name == "VAE" else args.batch_size
    latents = torch.randn(batch_size, vae.config.latent_channels, *(side // downsample_factor(vae) for side in size_px))
    photos = torch.rand(batch_size, 3, *size_px).to(memory_format=torch.channels_last)
    timesteps = torch.randint(1000, (batch_size,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with autocast(precision, "cpu"):
            if name == "VAE":
                loss = (model(photos, latents)[0].float() - photos).abs().mean()
            else:
                loss = denoising_loss(model(latents, timesteps, timesteps % 7).sample, latents).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def parts(model: torch.nn.Module, step: Callable[[], None]) -> Counter:
    """The convolutions (an Upsample2D is one) and linear layers that a step goes through, and their inputs' shapes: how often each."""
    found = Counter()

    def note(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found[layer, tuple(inputs[0].shape)] += 1

    within = [layer.conv for layer in model.modules() if isinstance(layer, Upsample2D)]
    kinds = torch.nn.Conv2d, torch.nn.Linear, Upsample2D
    layers = [layer for layer in model.modules() if isinstance(layer, kinds) and layer not in within]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    step()
    for hook in hooks:
        hook.remove()
    return found


def alone(layer: torch.nn.Module, shape: tuple[int, ...], precision: str, repeats: int) -> float:
    """The least seconds of the layer's forward and backward pass."""
    values = torch.randn(shape)
    values = (values.to(memory_format=torch.channels_last) if values.ndim == 4 else values).requires_grad_()
    with autocast(precision, "cpu"):
        towards = torch.randn_like(layer(values))

    def run() -> None:
        with autocast(precision, "cpu"):
            layer(values).backward(towards)

    return min(seconds(run, repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="tiny, base or large")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vae-batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the UNet's step alone, compiled: a VAE's may lose its gradients")
    args = parser.parse_args()
    precision = resolve_precision("auto", "cpu")
    torch.empty(2**23 - 2**12)  # 32 MB, freed at once: as in the scripts, glibc from then on keeps what is freed and has less cleared anew
    print(f"{machine('cpu')}, mixed precision {precision}")
    for name in ["UNet"] if args.compile else ["VAE", "UNet"]:
        whole = {}
        for attention in ("fused", "math"):  # the scripts take what is faster on a CPU with bf16
            torch.backends.cuda.enable_flash_sdp(attention == "fused")  # models are built accordingly
            model, step = training_step(name, args, precision)
            with FlopCounterMode(display=False) as counter:  # which does not know the fused kernel: what is reported is the last, "math"
                step()
            layers = parts(model, step)
            if args.compile:
                model.compile()
            whole[attention] = float(np.median(seconds(step, 4 * args.repeats)))
        attention, whole = min(whole.items(), key=lambda item: item[1])
        peak = sum(often * alone(layer, shape, precision, args.repeats) for (layer, shape), often in layers.items())
        flops = counter.get_total_flops()
        print(
            f"| {name} step{', compiled' * args.compile}, {args.config}, {args.image_size} px, {attention} attention "
            f"| {1e3 * whole:.3g} ms, {flops / whole / 1e9:,.0f} GFLOP/s; its layers "
            f"alone {1e3 * peak:.3g} ms, {flops / peak / 1e9:,.0f} GFLOP/s | {peak / whole:.0%} of the peak |"
        )


if __name__ == "__main__":
    main()
