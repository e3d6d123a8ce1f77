"""Can a person who did not make the samples recognise what they show?

python benchmarks/viewer.py --pipeline diffusion_models --output-dir viewer

Writes sheet.png, with the same number of samples of each class, shuffled and numbered. Writes key.txt, with the class
of each sample. Show a person the sheet and the class names, and compare the answers with key.txt.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from corel_diffusers.config.commands import Generate
from corel_diffusers.files import write_text
from corel_diffusers.plots import image_grid, save_image
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device
from corel_diffusers.sampling.samplers import AUTO, build_sampler
from corel_diffusers.sampling.samples import labels_for_images, sample_images

SHOWN_PX = 192


def numbered(number: int, sample: Image.Image) -> Image.Image:
    """Return the sample enlarged, with its number above it."""
    canvas = Image.new("RGB", (SHOWN_PX, SHOWN_PX + 20), "white")
    canvas.paste(ImageOps.pad(sample, (SHOWN_PX, SHOWN_PX), Image.Resampling.BICUBIC, "white"), (0, 20))
    ImageDraw.Draw(canvas).text((0, 0), str(number), fill="black", font=ImageFont.load_default(size=15))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("viewer"))
    parser.add_argument("--per-class", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline, pick_device("auto"))
    if not pipe.config.class_names:
        parser.error("--pipeline: the model was trained without classes: use a pipeline with classes")
    pipe.scheduler = build_sampler(AUTO, pipe.scheduler)
    labels = labels_for_images(pipe, (), args.per_class * len(pipe.config.class_names))
    sampling_args = Generate(num_images=len(labels), batch_size=len(labels), mixed_precision="no")
    samples = sample_images(pipe, sampling_args, labels, args.seed, num_inference_steps=15)
    labelled_samples = list(zip(samples, (pipe.config.class_names[str(label)] for label in labels), strict=True))
    random.Random(args.seed).shuffle(labelled_samples)
    sheet = image_grid(
        [numbered(number, sample) for number, (sample, _) in enumerate(labelled_samples, 1)], nrow=6, gap_px=12
    )
    save_image(sheet, args.output_dir / "sheet.png")
    write_text(
        args.output_dir / "key.txt",
        "".join(f"{number}: {name}\n" for number, (_, name) in enumerate(labelled_samples, 1)),
    )


if __name__ == "__main__":
    main()
