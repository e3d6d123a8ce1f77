"""How much faster is the toolkit's UNet training step than that of a plain loop and of denoising-diffusion-pytorch?

python benchmarks/unet_step.py --sizes 64 128 --repeats 5

The plain loop is in plain.py. It encodes each batch with the VAE. A second plain loop reads cached latents, as
train_unet.py always does. The toolkit's side is train_unet.py itself, without alignment and with AdamW. The full
training loop is timed. denoising-diffusion-pytorch gets cached latents and about as many parameters. It is left out if
it is not installed (pip install --no-deps denoising-diffusion-pytorch einops ema-pytorch).
"""

import importlib.util
import os
import tempfile
from functools import partial
from pathlib import Path

from common import QUIET, ROOT, compare, machine_name, make_photos, step_arguments, step_seconds

from corel_diffusers.models.vae import build_vae


def main() -> None:
    args = step_arguments(__doc__, batch_size=16, steps=20)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # a temporary cache
        photos = make_photos(Path(folder) / "photos")
        for size_px in args.sizes:
            vae = Path(folder) / f"vae-{size_px}"
            build_vae(args.config, (size_px, size_px)).save_pretrained(vae)
            shared = ["--config", args.config, "--image-size", size_px, "--batch-size", args.batch_size]
            plain = [
                ROOT / "benchmarks" / "plain.py",
                "unet",
                photos,
                *shared,
                "--vae",
                vae,
                "--steps",
                args.warmup + args.steps,
            ]
            flags = [
                "--align-weight",
                0,
                "--views",
                0,
                "--max-train-steps",
                args.warmup + args.steps,
                "--validate-every",
                10**6,
            ]
            toolkit = [
                ROOT / "train_unet.py",
                "--data-dir",
                photos,
                *shared,
                "--vae-checkpoint",
                vae,
                *flags,
                *args.compiled,
                *QUIET,
            ]
            sides = {
                "plain loop": plain,
                "plain loop, cached": [*plain, "--cached"],
                " ".join(["train_unet.py", *args.compiled]): toolkit,
            }
            if importlib.util.find_spec("denoising_diffusion_pytorch"):
                sides = {"denoising-diffusion-pytorch": [plain[0], "ddpm", *plain[2:]]} | sides
            sides = {name: partial(step_seconds, *arguments, warmup=args.warmup) for name, arguments in sides.items()}
            lines.append(
                compare(f"UNet step, {args.config}, {size_px} px, batch {args.batch_size}", sides, args.repeats)
            )
    print(machine_name(), *lines, sep="\n")


if __name__ == "__main__":
    main()
