"""Can somebody who did not make them tell what the pictures show?

python benchmarks/viewer.py --pipeline diffusion_models --output-dir viewer

Leaves sheet.png, as many numbered pictures of each class, shuffled, and key.txt, the class of each. Show somebody the sheet and the names
of the classes, and compare.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from corel_diffusers.cli import Generate
from corel_diffusers.files import write_text
from corel_diffusers.generate import AUTO, build_sampler, load_pipeline, pick_device, pick_labels, sample_pictures
from corel_diffusers.plots import picture_grid, save_picture

SHOWN_PX = 192


def numbered(number: int, picture: Image.Image) -> Image.Image:
    """The picture enlarged, its number above it."""
    framed = Image.new("RGB", (SHOWN_PX, SHOWN_PX + 20), "white")
    framed.paste(ImageOps.pad(picture, (SHOWN_PX, SHOWN_PX), Image.Resampling.BICUBIC, "white"), (0, 20))
    ImageDraw.Draw(framed).text((0, 0), str(number), fill="black", font=ImageFont.load_default(size=15))
    return framed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("viewer"))
    parser.add_argument("--per-class", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline, pick_device("auto"))
    if not pipe.config.class_names:
        parser.error("--pipeline was trained without classes: there is nothing to tell")
    pipe.scheduler = build_sampler(AUTO, pipe.scheduler)
    labels = pick_labels(pipe, (), args.per_class * len(pipe.config.class_names))
    drawing = Generate(num_images=len(labels), batch_size=len(labels), mixed_precision="no")
    pictures = sample_pictures(pipe, drawing, labels, args.seed, num_inference_steps=15)
    made = list(zip(pictures, (pipe.config.class_names[str(label)] for label in labels), strict=True))
    random.Random(args.seed).shuffle(made)
    sheet = picture_grid([numbered(place, picture) for place, (picture, _) in enumerate(made, 1)], nrow=6, gap_px=12)
    save_picture(sheet, args.output_dir / "sheet.png")
    write_text(args.output_dir / "key.txt", "".join(f"{place}: {name}\n" for place, (_, name) in enumerate(made, 1)))


if __name__ == "__main__":
    main()
