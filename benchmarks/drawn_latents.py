"""What do samples lose in the UNet, and what does a decoder gain that has seen the latents that the UNet draws?

python benchmarks/drawn_latents.py --pipeline diffusion_models --data-dir training_data/corel/corel_all

A VAE learns to decode the latents of photos. The latents that a UNet draws are different: their fine detail is averaged
away. The script measures this in two steps.

1. KID by noise level. Noise is added to the latents of the training photos up to a level, and the UNet removes it. The
   decoded images are compared with the validation photos. At level 0 these are the VAE's reconstructions, and at
   level 1 the samples.
2. A tuned decoder: as `corel-diffusers tune-decoder` does it for --minutes. The pipeline in its folder stays as it is.

The perceptual loss and KID use the same network, which flatters the tuned decoder. Look at the images too. Run nothing
else at the same time. Writes drawn_latents.md and drawn_latents.png, which shows your photos' subjects: samples before
and after. Do not publish it if the photos are not yours.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from common import machine_name
from diffusers import AutoencoderKL
from PIL import Image

from corel_diffusers.data.latents import cache_moments, scale_latents
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.decoder_tuning import class_names_of, current_pipeline, denoise_from, tune
from corel_diffusers.evaluation.features import extract, load_network
from corel_diffusers.evaluation.kid import kernel_distance
from corel_diffusers.files import write_text
from corel_diffusers.plots import image_grid, save_image
from corel_diffusers.runtime.precision import resolve_precision
from corel_diffusers.sampling.pipelines import load_pipeline
from pipeline import CorelPipeline

CPU = torch.device("cpu")
LEVELS = (0.1, 0.2, 0.4, 0.6, 0.8)
DRAWN_AT_ONCE = 64


@torch.no_grad()
def denoised(pipe: CorelPipeline, clean: torch.Tensor, class_names: list[str], level: float) -> torch.Tensor:
    """Add noise to scaled latents (N, C, h, w) up to a level from 0 to 1, and let the UNet remove it."""
    starts = range(0, len(clean), DRAWN_AT_ONCE)
    parts = ((clean[start : start + DRAWN_AT_ONCE], class_names[start : start + DRAWN_AT_ONCE]) for start in starts)
    return torch.cat([denoise_from(pipe, *part, level) for part in parts])


def drawn(pipe: CorelPipeline, class_names: list[str], seed: int) -> torch.Tensor:
    """Return the scaled latents of one free sample per class name: (N, C, h, w)."""
    generator, starts = torch.Generator().manual_seed(seed), range(0, len(class_names), DRAWN_AT_ONCE)
    parts = (class_names[start : start + DRAWN_AT_ONCE] for start in starts)
    return torch.cat([pipe(part, generator=generator, output_type="latent").images for part in parts])


def decoded(pipe: CorelPipeline, vae: AutoencoderKL, latents: torch.Tensor) -> np.ndarray:
    """Decode scaled latents with a VAE: uint8 (N, H, W, 3)."""
    pipe.register_modules(vae=vae)
    with torch.no_grad():
        return (255 * pipe.decode(latents, "np")).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--minutes", type=float, default=2, help="training of the decoder")
    args = parser.parse_args()

    torch.manual_seed(0)
    pipe = current_pipeline(load_pipeline(args.pipeline, CPU))
    photos, pixels = cache_pixels(load_photos(args.data_dir), pipe.default_size)
    vae, network, class_names = copy.deepcopy(pipe.vae), load_network("efficientnet-lite0", CPU), class_names_of(photos)
    labels, held_out_labels = (torch.tensor(photos[split]["label"][:]) for split in ("train", "validation"))
    held_out = extract(network, pixels["validation"].values)
    moments = torch.from_numpy(np.asarray(cache_moments(vae, pixels["train"], CPU, batch_size=16)))
    clean = scale_latents(moments[:, 0].chunk(2, 1)[0], vae)

    def kid(vae: AutoencoderKL, latents: torch.Tensor) -> float:
        features = extract(network, decoded(pipe, vae, latents))
        return 1e3 * float(kernel_distance(features, held_out, labels_a=labels, labels_b=held_out_labels))

    samples = [drawn(pipe, class_names, seed) for seed in (1, 2)]
    lines = ["| latents | KID x1000 |", "|---|---|", f"| of photos, not denoised | {kid(vae, clean):.1f} |"]
    lines += [
        f"| denoised from {level} | {kid(vae, denoised(pipe, clean, class_names, level)):.1f} |" for level in LEVELS
    ]
    lines += [f"| free samples, seed {seed} | {kid(vae, part):.1f} |" for seed, part in enumerate(samples, 1)]

    tuned, precision = copy.deepcopy(vae), resolve_precision("auto", "cpu")
    pipe.register_modules(vae=tuned)
    tune(pipe, pixels["train"], class_names, 60 * args.minutes, time.monotonic(), precision)
    lines.append(f"| of photos, tuned decoder | {kid(tuned, clean):.1f} |")
    lines += [
        f"| free samples, seed {seed}, tuned decoder | {kid(tuned, part):.1f} |" for seed, part in enumerate(samples, 1)
    ]
    shown = samples[0][:: len(labels) // 24][:24]  # the photos are sorted by class
    rows = [decoded(pipe, model, part) for part in shown.split(12) for model in (vae, tuned)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_image(
        image_grid([Image.fromarray(image) for image in np.concatenate(rows)], 12),
        args.output_dir / "drawn_latents.png",
    )
    settings = f"{len(clean)} photos, {args.minutes:g} minutes"
    write_text(args.output_dir / "drawn_latents.md", "\n".join([f"{settings}, {machine_name()}", "", *lines, ""]))
    print((args.output_dir / "drawn_latents.md").read_text())


if __name__ == "__main__":
    main()
