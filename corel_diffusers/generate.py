"""Generate samples with a trained pipeline: `corel-diffusers generate`."""

import math
import secrets
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from corel_diffusers.cli import Generate, Sampling
from corel_diffusers.ddim import DDIM
from corel_diffusers.files import UserError, atomic_file, first_line, is_out_of_memory
from corel_diffusers.latents import config_key, load_vae, scale_key, weights_key
from corel_diffusers.models import downsample_factor
from corel_diffusers.plots import picture_grid, save_picture
from corel_diffusers.precision import autocast, resolve_precision

AUTO = "dpm-solver++"  # in 15 steps as near to the photos as DDIM in 50: benchmarks/results/sampling.md
DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "dpm-solver++": 15, "unipc": 15}
INDIVIDUAL_UP_TO = 16  # up to this many samples are also saved as single images
LONGEST_SIDE_PX = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # maximum side of the formats


def generate(args: Generate, output: Path) -> None:
    """Generate samples. Save each one in `<output>_individual/` as soon as it is done, and then a grid in `output`.

    Without --individual, single images are saved for up to INDIVIDUAL_UP_TO samples only. Each sample has its own
    random generator with the seed `seed + index`. The batch size and the number of samples therefore do not change a
    sample, except for the rounding of half precision.
    """
    device = pick_device(args.device)
    args.mixed_precision = resolve_precision(args.mixed_precision, device.type)
    pipe = load_pipeline(args.pipeline, device, args.vae_checkpoint)
    labels = labels_for_images(pipe, args.class_, args.num_images)
    check_grid_size(pipe, args)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    sampler, steps = pick_sampler(args)
    pipe.scheduler = build_sampler(sampler, pipe.scheduler)
    steps = possible_steps(pipe.scheduler, steps)
    print(f"{args.num_images} samples, {sampler} with {steps} steps on {device}, seed {seed}")
    folder, images = output.with_name(f"{output.stem}_individual"), []
    files = [folder / f"image_{index:04d}.png" for index in range(args.num_images)]
    individual = args.individual or args.num_images <= INDIVIDUAL_UP_TO
    for index, image in enumerate(sample_images(pipe, args, labels, seed, num_inference_steps=steps, eta=args.eta)):
        images.append(image)
        if individual:
            info = PngInfo()
            info.add_text("seed", str(seed + index))
            if labels:
                info.add_text("class", pipe.config.class_names[str(labels[index])])
            with atomic_file(files[index]) as temporary:
                image.save(temporary, pnginfo=info)

    save_picture(picture_grid(images, args.nrow), output)
    print(f"grid: {output}")
    if individual:
        for old_file in set(folder.glob("image_*.png")) - set(files):
            old_file.unlink()
        print(f"single images: {folder}/")


def check_grid_size(pipe: DiffusionPipeline, args: Generate) -> None:
    """Raise UserError if the grid is too large for its file format, before hours are spent on sampling."""
    longest = LONGEST_SIDE_PX.get(Path(args.output).suffix.lower(), math.inf)
    height, width = picture_size_px(pipe)
    rows, columns = math.ceil(args.num_images / args.nrow), min(args.nrow, args.num_images)
    if max(rows * (height + 2), columns * (width + 2)) + 2 > longest:
        raise UserError(
            f"--output {args.output}: the grid has a side of more than {longest} px, too long for its format: give .png"
        )


def picture_size_px(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Return the (height, width) of the samples of a pipeline, in pixels."""
    size, factor = pipe.unet.config.sample_size, downsample_factor(pipe.vae)
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def sample_images(
    pipe: DiffusionPipeline, args: Sampling, labels: list[int] | None, seed: int, **options: object
) -> Iterator[Image.Image]:
    """Generate samples in batches and yield them one by one. Each has its own random generator: `seed + index`.

    Args:
        labels: one label per sample, or None for an unconditional model.
        options: more arguments for the pipeline.

    Raises:
        UserError: there is not enough memory for a batch.
    """
    for start in tqdm(
        range(0, args.num_images, args.batch_size),
        "generating",
        leave=False,
        disable=args.num_images <= args.batch_size,
    ):
        indices = range(start, min(start + args.batch_size, args.num_images))
        pipe.set_progress_bar_config(desc="denoising", leave=False, mininterval=1)
        try:
            with autocast(args.mixed_precision, pipe.device.type):
                output = pipe(
                    len(indices),
                    [labels[index] for index in indices] if labels else None,
                    generator=[torch.Generator().manual_seed(seed + index) for index in indices],
                    guidance_scale=args.guidance_scale,
                    guidance_interval=guidance_interval(args, pipe),
                    **options,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"out of memory with --batch-size {args.batch_size}: give a smaller one") from None
        yield from output.images


def guidance_interval(args: Sampling, pipe: DiffusionPipeline) -> tuple[float, float]:
    """Return the lowest and the highest noise level at which guidance acts, from 0 (clean) to 1 (pure noise)."""
    # pipelines of earlier versions have no default interval: their guidance acts at all noise levels
    return args.guidance_interval or getattr(pipe, "default_guidance_interval", (0.0, 1.0))


def pick_sampler(args: Sampling) -> tuple[str, int]:
    """Return the name of the sampler and its number of steps."""
    sampler = AUTO if args.sampler == "auto" else args.sampler
    return sampler, args.steps or DEFAULT_STEPS[sampler]


def build_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the sampler of this name for a model that was trained with `scheduler`."""
    if name == "dpm-solver++":
        return DPMSolverMultistepScheduler.from_config(scheduler.config, **dpm_solver_options(scheduler.config))
    kind = {"ddpm": DDPMScheduler, "ddim": DDIM, "unipc": UniPCMultistepScheduler}[name]
    return kind.from_config(scheduler.config, **first_timestep_options(scheduler))


def possible_steps(sampler: SchedulerMixin, steps: int) -> int:
    """Return the largest number of steps, at most `steps`, for which all timesteps lie in the schedule.

    At some numbers of steps, such as 61, the rounding of diffusers adds a timestep below 0. The last step would then
    bring the noise back.
    """
    for possible in range(min(steps, sampler.config.num_train_timesteps), 1, -1):
        sampler.set_timesteps(possible)
        if sampler.timesteps.min() >= 0:
            return possible
    return 1


def first_timestep_options(scheduler: SchedulerMixin) -> dict[str, object]:
    """Return options that let other samplers begin at the same timestep as DPM-Solver++.

    A model that predicts the noise needs them. To compute the photo from the noise, a sampler divides by sqrt(a). At
    the last timesteps of the cosine schedule sqrt(a) is almost 0, so these timesteps are left out of the schedule.
    """
    lambda_min = dpm_solver_options(scheduler.config).get("lambda_min_clipped")
    if lambda_min is None or scheduler.config.prediction_type != "epsilon":
        return {}
    alphas_cumprod = scheduler.alphas_cumprod
    num_timesteps = int((0.5 * (alphas_cumprod / (1 - alphas_cumprod)).log() >= lambda_min).sum())
    return {"num_train_timesteps": num_timesteps, "trained_betas": scheduler.betas[:num_timesteps].tolist()}


def dpm_solver_options(config: dict) -> dict[str, float]:
    """Return the options of DPM-Solver++ for a model that was trained with a scheduler of this config.

    On the cosine schedule, the timesteps with log-SNR / 2 below -5.1 are left out, as diffusers advises. At these last
    timesteps the predicted noise would have to be divided by almost 0. A schedule with zero terminal SNR keeps all
    timesteps, because its model was trained to begin at pure noise.
    """
    return (
        {}
        if config.get("rescale_betas_zero_snr") or config["beta_schedule"] == "linear"
        else {"lambda_min_clipped": -5.1}
    )


def pick_device(name: str) -> torch.device:
    """Return the device of the flag --device. "auto" is cuda if there is a GPU, otherwise cpu.

    Raises:
        UserError: the device is unknown, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is no GPU here: give cpu or auto")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown: give auto, cuda or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there are only {torch.cuda.device_count()} GPUs here: their numbers start at cuda:0"
        )
    return device


def load_pipeline(
    location: Path | str, device: torch.device, vae_location: Path | str | None = None
) -> DiffusionPipeline:
    """Load the pipeline from a folder or a Hub id. If `vae_location` is given, load the VAE from there instead.

    Raises:
        UserError: the pipeline cannot be loaded, it is not a pipeline of train_unet.py, or the VAE does not fit.
    """
    try:
        pipe = DiffusionPipeline.from_pretrained(
            location, trust_remote_code=True, use_safetensors=True, local_files_only=isinstance(location, Path)
        )
    except (OSError, ValueError, ImportError) as error:
        hint = "give the --output-dir of a train_unet.py run, or a Hub id"
        raise UserError(f"--pipeline {location} cannot be loaded ({first_line(error)}): {hint}") from None
    if "class_names" not in pipe.config:
        raise UserError(f"--pipeline {location} is a {type(pipe).__name__}: give one that train_unet.py wrote")
    if vae_location:
        vae = load_vae(vae_location)
        if any(key(vae) != key(pipe.vae) for key in (weights_key, config_key, scale_key)):
            if vae.config.latent_channels != pipe.vae.config.latent_channels:
                raise UserError(
                    f"--vae-checkpoint {vae_location} has other latents than the pipeline's VAE: omit the flag"
                )
            print("notice: --vae-checkpoint is not the VAE that this UNet was trained with: the samples may be garbage")
            pipe.register_modules(vae=vae)
    return pipe.to(device)


def labels_for_images(pipe: DiffusionPipeline, classes: Sequence[str], num_images: int) -> list[int] | None:
    """Return one label per sample, or None for a model without classes. The labels cycle through the given classes.

    Args:
        classes: names of classes, or their numbers in the data. Empty: all classes. Pipelines of earlier versions have
            no numbers of classes. For them, a number is a label, counted from 0.

    Raises:
        UserError: an unknown class, or a class for a model without classes.
    """
    names = {int(label): name for label, name in (pipe.config.class_names or {}).items()}
    if not names:
        if classes:
            raise UserError("--class: this model was trained without classes: omit the flag")
        return None
    numbers = {int(label): number for label, number in (getattr(pipe.config, "class_numbers", None) or {}).items()}
    label_of_number = {numbers.get(label, label): label for label in names}
    chosen = []
    for class_ in classes:
        label = next(
            (label for label, name in names.items() if name == class_),
            label_of_number.get(int(class_)) if class_.isdigit() else None,
        )
        if label is None:
            known = ", ".join(f"{number} {names[label]}" for number, label in label_of_number.items())
            raise UserError(f"--class {class_} is unknown: the classes are {known}")
        chosen.append(label)
    return list(islice(cycle(chosen or names), num_images))
