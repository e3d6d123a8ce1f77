"""Generate samples with a trained pipeline: `corel-diffusers generate`."""

import math
import secrets
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from corel_diffusers.config.checks import parse_size
from corel_diffusers.config.commands import Generate
from corel_diffusers.files import UserError, atomic_file
from corel_diffusers.plots import image_grid, save_image
from corel_diffusers.runtime.precision import resolve_precision
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device, sample_size_px, trained_sizes_px
from corel_diffusers.sampling.samplers import set_sampler
from corel_diffusers.sampling.samples import labels_for_images, sample_images

INDIVIDUAL_UP_TO = 16  # up to this many samples are also saved as single images
LONGEST_SIDE_PX = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # maximum side of the formats


def generate(args: Generate, output: Path) -> list[Image.Image]:
    """Generate samples and return them.

    Each one is saved in `<output>_individual/` as soon as it is done, and then a grid of all in `output`.

    Without --individual, single images are saved for up to INDIVIDUAL_UP_TO samples only. Each sample has its own
    random generator with the seed `seed + index`. The batch size and the number of samples therefore do not change a
    sample, except for the rounding of half precision.
    """
    device = pick_device(args.device)
    args = replace(args, mixed_precision=resolve_precision(args.mixed_precision, device.type))
    pipe = load_pipeline(args.pipeline_location, device, args.vae_location, args.trust_remote_code)
    labels = labels_for_images(pipe, args.class_, args.num_images)
    size_px = check_size(pipe, args)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    sampler, steps = set_sampler(pipe, args)
    print(f"{args.num_images} samples, {sampler} with {steps} steps on {device}, seed {seed}")
    folder, images = output.with_name(f"{output.stem}_individual"), []
    files = [folder / f"image_{index:04d}.png" for index in range(args.num_images)]
    individual = args.individual or args.num_images <= INDIVIDUAL_UP_TO
    sizes_px, options = [size_px] * args.num_images, {"num_inference_steps": steps, "eta": args.eta}
    for index, image in enumerate(sample_images(pipe, args, labels, seed, sizes_px, **options)):
        images.append(image)
        if individual:
            info = PngInfo()
            info.add_text("seed", str(seed + index))
            if labels:
                info.add_text("class", pipe.config.class_names[str(labels[index])])
            with atomic_file(files[index]) as temporary:
                image.save(temporary, pnginfo=info)

    save_image(image_grid(images, args.nrow), output)
    print(f"grid: {output}")
    if individual:
        for old_file in set(folder.glob("image_*.png")) - set(files):
            old_file.unlink()
        print(f"single images: {folder}/")
    else:
        print(
            f"single images: none, because there are more than {INDIVIDUAL_UP_TO}: give --individual to save them too"
        )
    return images


def check_size(pipe: DiffusionPipeline, args: Generate) -> tuple[int, int]:
    """Return the (height, width) of the samples in pixels.

    Raises:
        UserError: the pipeline cannot draw this size, or the grid is too large for its file format.
    """
    sizes_px = trained_sizes_px(pipe)
    height, width = size_px = parse_size(args.size, "--size") if args.size else sample_size_px(pipe)
    if size_px not in sizes_px:
        names = ", ".join(f"{height}x{width}" for height, width in sizes_px)
        raise UserError(f"--size {args.size}: the pipeline was trained on {names}: give one of these sizes")
    longest = LONGEST_SIDE_PX.get(Path(args.output).suffix.lower(), math.inf)
    rows, columns = math.ceil(args.num_images / args.nrow), min(args.nrow, args.num_images)
    if max(rows * (height + 2), columns * (width + 2)) + 2 > longest:
        raise UserError(
            f"--output {args.output}: the grid has a side of more than {longest} px, too long for its format: give .png"
        )
    return size_px
