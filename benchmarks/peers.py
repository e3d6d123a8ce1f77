"""Train a peer of the contest for a number of seconds on a folder of photos, then draw samples from it.

python benchmarks/peers.py denoising-diffusion-pytorch PHOTOS PICTURES --seconds 900 --num-images 300
python benchmarks/peers.py diffusers-pixels PHOTOS PICTURES --seconds 900 --num-images 300

PHOTOS is a folder of square PNG files that have the training size. PICTURES is the folder for the samples.
PICTURES.json records the seconds of training. The first peer needs `pip install --no-deps denoising-diffusion-pytorch
einops ema-pytorch`. The clock starts with this script, so that imports and loading count, as they do for the toolkit.
"""

import time

BEGAN = time.monotonic()

import argparse
import contextlib
import math
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from corel_diffusers.files import write_json
from corel_diffusers.models.configs import parameter_count


class TimeIsUp(Exception):
    """Stops a training loop that can only count steps."""


def until(deadline: float, batches: Iterator) -> Iterator:
    """Yield the batches of a loader. Raise TimeIsUp at the deadline."""
    for batch in batches:
        if time.monotonic() >= deadline:
            raise TimeIsUp
        yield batch


def stand_in_for_torchvision() -> None:
    """Replace torchvision by Compose and the five transforms that the trainer's dataset uses, written with Pillow.

    torchvision has no build that goes with torch's CPU build.
    """
    compose = lambda steps: nn.Sequential(*steps)  # noqa: E731
    as_module = lambda f: type("Step", (nn.Module,), {"forward": staticmethod(f)})()  # noqa: E731
    random_flip = lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else x  # noqa: E731
    to_tensor = lambda x: torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 255  # noqa: E731
    no_change = lambda size: as_module(lambda x: x)  # noqa: E731 - the photos already are square and have the size
    transforms = types.SimpleNamespace(
        Compose=compose,
        Lambda=as_module,
        Resize=no_change,
        CenterCrop=no_change,
        RandomHorizontalFlip=lambda: as_module(random_flip),
        ToTensor=lambda: as_module(to_tensor),
    )
    module = types.ModuleType("torchvision")
    module.transforms, module.utils = transforms, types.SimpleNamespace()
    sys.modules["torchvision"] = module


def denoising_diffusion_pytorch(photos: Path, seconds: float, num_images: int, steps: int) -> tuple[torch.Tensor, dict]:
    """Train denoising-diffusion-pytorch with its own Trainer. Return samples and facts about the training.

    It uses the package's Unet and GaussianDiffusion. dim_mults is that of its README. dim is reduced from 64 to 32 to
    fit.
    """
    stand_in_for_torchvision()
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    size_px = Image.open(next(photos.glob("*.png"))).width
    unet = Unet(dim=32, dim_mults=(1, 2, 4, 8))
    diffusion = GaussianDiffusion(unet, image_size=size_px, timesteps=1000, sampling_timesteps=steps)
    with tempfile.TemporaryDirectory() as results:
        trainer = Trainer(
            diffusion, str(photos), train_batch_size=16, gradient_accumulate_every=1, train_lr=8e-5,
            train_num_steps=10**9, ema_decay=0.995, calculate_fid=False, save_and_sample_every=10**9,
            results_folder=results,
        )  # fmt: skip
        trainer.dl = until(BEGAN + seconds, trainer.dl)
        with contextlib.suppress(TimeIsUp):
            trainer.train()
    training_info = {
        "seconds": time.monotonic() - BEGAN,
        "steps": trainer.step,
        "batch": 16,
        "parameters": parameter_count(unet),
    }
    sampler = trainer.ema.ema_model.eval()
    with torch.inference_mode():
        return torch.cat(
            [sampler.sample(batch_size=len(indices)) for indices in torch.arange(num_images).split(25)]
        ), training_info


def diffusers_pixels(photos: Path, seconds: float, num_images: int, steps: int) -> tuple[torch.Tensor, dict]:
    """Train the unconditional example of diffusers in pixel space. Return samples and facts about the training.

    It uses the example's DDPM, AdamW, EMA and warm-up, and its UNet2DModel with a quarter of the channels.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1).float() / 127.5 - 1
            for f in sorted(photos.glob("*.png"))
        ]
    ).to(device)
    unet = UNet2DModel(
        sample_size=images.shape[-1], layers_per_block=2, block_out_channels=(32, 32, 64, 64, 128, 128),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    ).to(device)  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    # The example's cosine schedule needs the number of steps, which is not known here.
    lr_scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=500)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    step = 0
    while time.monotonic() < BEGAN + seconds:
        batch = images[torch.randint(len(images), (16,))]
        batch = torch.where(torch.rand(16, 1, 1, 1, device=device) < 0.5, batch.flip(-1), batch)
        noise, timesteps = torch.randn_like(batch), torch.randint(1000, (16,), device=device)
        loss = nn.functional.mse_loss(unet(scheduler.add_noise(batch, noise, timesteps), timesteps).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        step += 1
    training_info = {
        "seconds": time.monotonic() - BEGAN,
        "steps": step,
        "batch": 16,
        "parameters": parameter_count(unet),
    }
    ema.copy_to(unet.parameters())
    sampler, samples = DDIMScheduler.from_config(scheduler.config), []
    sampler.set_timesteps(steps)
    with torch.inference_mode():
        for indices in torch.arange(num_images).split(25):
            sample = torch.randn(len(indices), *images.shape[1:], device=device)
            for timestep in sampler.timesteps:
                sample = sampler.step(unet(sample, timestep).sample, timestep, sample).prev_sample
            samples.append((sample.clamp(-1, 1) + 1) / 2)
    return torch.cat(samples), training_info


PEERS = {"denoising-diffusion-pytorch": denoising_diffusion_pytorch, "diffusers-pixels": diffusers_pixels}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("photos", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--num-images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=50, help="steps of DDIM; sampling is not part of the seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    samples, training_info = PEERS[args.peer](args.photos, args.seconds, args.num_images, args.steps)
    args.pictures.mkdir(parents=True, exist_ok=True)
    digits = math.ceil(math.log10(len(samples) + 1))
    for index, image in enumerate(samples.cpu()):
        Image.fromarray((image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()).save(
            args.pictures / f"{index:0{digits}d}.png"
        )
    write_json(args.pictures.with_suffix(".json"), training_info)
    print(f"{args.peer}: {training_info['steps']} steps of {training_info['batch']}, {training_info['parameters']}")
