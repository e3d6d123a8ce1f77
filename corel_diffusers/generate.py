"""Pictures from a trained pipeline: `corel-diffusers generate`."""

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
from corel_diffusers.files import UserError, first_line, is_out_of_memory, whole_file
from corel_diffusers.latents import config_key, load_vae, scale_key, weights_key
from corel_diffusers.models import downsample_factor
from corel_diffusers.plots import picture_grid, save_picture
from corel_diffusers.precision import autocast, resolve_precision

AUTO = "dpm-solver++"  # benchmarks/results/sampling.md: in 15 steps as near to the photos as DDIM in 50
DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "dpm-solver++": 15, "unipc": 15}
INDIVIDUAL_UP_TO = 16
LONGEST_SIDE_PX = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # what the formats can hold


def generate(args: Generate, output: Path) -> None:
    """Writes each picture, where asked for, to `<output>_individual/` as it comes, and then the grid of all to `output`.

    Each picture has a generator of its own, seed + place: neither the batch size nor the number of pictures changes it, but for the
    rounding of half precision.
    """
    device = pick_device(args.device)
    args.mixed_precision = resolve_precision(args.mixed_precision, device.type)
    pipe = load_pipeline(args.pipeline, device, args.vae_checkpoint)
    labels = pick_labels(pipe, args.class_, args.num_images)
    refuse_too_large(pipe, args)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    sampler, steps = pick_sampler(args)
    pipe.scheduler = build_sampler(sampler, pipe.scheduler)
    steps = possible_steps(pipe.scheduler, steps)
    print(f"{args.num_images} pictures, {sampler} with {steps} steps on {device}, seed {seed}")
    folder, pictures = output.with_name(f"{output.stem}_individual"), []
    files = [folder / f"image_{place:04d}.png" for place in range(args.num_images)]
    individual = args.individual or args.num_images <= INDIVIDUAL_UP_TO
    for place, picture in enumerate(sample_pictures(pipe, args, labels, seed, num_inference_steps=steps, eta=args.eta)):
        pictures.append(picture)
        if individual:
            info = PngInfo()
            info.add_text("seed", str(seed + place))
            if labels:
                info.add_text("class", pipe.config.class_names[str(labels[place])])
            with whole_file(files[place]) as beside:
                picture.save(beside, pnginfo=info)

    save_picture(picture_grid(pictures, args.nrow), output)
    print(f"grid: {output}")
    if individual:
        for earlier in set(folder.glob("image_*.png")) - set(files):
            earlier.unlink()
        print(f"each picture: {folder}/")


def refuse_too_large(pipe: DiffusionPipeline, args: Generate) -> None:
    """Refuses a grid that its format has no room for, before hours go into its pictures."""
    longest = LONGEST_SIDE_PX.get(Path(args.output).suffix.lower(), math.inf)
    height, width = picture_size_px(pipe)
    rows, columns = math.ceil(args.num_images / args.nrow), min(args.nrow, args.num_images)
    if max(rows * (height + 2), columns * (width + 2)) + 2 > longest:
        raise UserError(f"--output {args.output}: the grid has a side of more than {longest} px, too long for its format: give .png")


def picture_size_px(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) of what the pipeline makes."""
    size, factor = pipe.unet.config.sample_size, downsample_factor(pipe.vae)
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def sample_pictures(
    pipe: DiffusionPipeline, args: Sampling, labels: list[int] | None, seed: int, **options: object
) -> Iterator[Image.Image]:
    """Pictures in batches, each from a generator of its own, seed + place. options: more for the pipeline. Raises UserError where the
    memory does not do for a batch."""
    for start in tqdm(range(0, args.num_images, args.batch_size), "generating", leave=False, disable=args.num_images <= args.batch_size):
        places = range(start, min(start + args.batch_size, args.num_images))
        pipe.set_progress_bar_config(desc="denoising", leave=False, mininterval=1)
        try:
            with autocast(args.mixed_precision, pipe.device.type):
                made = pipe(
                    len(places),
                    [labels[place] for place in places] if labels else None,
                    generator=[torch.Generator().manual_seed(seed + place) for place in places],
                    guidance_scale=args.guidance_scale,
                    guidance_interval=guidance_interval(args, pipe),
                    **options,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"out of memory with --batch-size {args.batch_size}: give a smaller one") from None
        yield from made.images


def guidance_interval(args: Sampling, pipe: DiffusionPipeline) -> tuple[float, float]:
    """The noise levels within which guidance acts."""
    return args.guidance_interval or getattr(pipe, "default_guidance_interval", (0.0, 1.0))  # of an earlier version's pipeline, all


def pick_sampler(args: Sampling) -> tuple[str, int]:
    """The sampler and its number of steps."""
    sampler = AUTO if args.sampler == "auto" else args.sampler
    return sampler, args.steps or DEFAULT_STEPS[sampler]


def build_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """The sampler for a model trained with `scheduler`."""
    if name == "dpm-solver++":
        return DPMSolverMultistepScheduler.from_config(scheduler.config, **dpm_solver_options(scheduler.config))
    return {"ddpm": DDPMScheduler, "ddim": DDIM, "unipc": UniPCMultistepScheduler}[name].from_config(
        scheduler.config, **first_timestep_options(scheduler)
    )


def possible_steps(sampler: SchedulerMixin, steps: int) -> int:
    """As many of the steps as the sampler can make: at most one a timestep, and a number for which diffusers' spacing of the timesteps
    places none below 0, which at 61 steps, for one, it does: that step would bring the noise back."""
    for possible in range(min(steps, sampler.config.num_train_timesteps), 1, -1):
        sampler.set_timesteps(possible)
        if sampler.timesteps.min() >= 0:
            return possible
    return 1


def first_timestep_options(scheduler: SchedulerMixin) -> dict[str, object]:
    """What makes other samplers begin where DPM-Solver++ does, for a model that predicts the noise: to find the photo, that is divided by
    sqrt(a) of the timestep, which on the cosine schedule's last ones is almost 0. Their noise level is left out of the schedule."""
    lowest = dpm_solver_options(scheduler.config).get("lambda_min_clipped")
    if lowest is None or scheduler.config.prediction_type != "epsilon":
        return {}
    kept = scheduler.alphas_cumprod
    timesteps = int((0.5 * (kept / (1 - kept)).log() >= lowest).sum())
    return {"num_train_timesteps": timesteps, "trained_betas": scheduler.betas[:timesteps].tolist()}


def dpm_solver_options(config: dict) -> dict[str, float]:
    """What DPM-Solver++ has to be told for a model trained with a scheduler of that config.

    It leaves out the last timesteps of the cosine schedule, where a predicted noise has to be divided by almost 0 (log-SNR / 2 below
    -5.1, as diffusers advises); not of one that ends in pure noise, which the model was trained to begin with.
    """
    return {} if config.get("rescale_betas_zero_snr") or config["beta_schedule"] == "linear" else {"lambda_min_clipped": -5.1}


def pick_device(wanted: str) -> torch.device:
    """auto -> cuda where there is one. Raises UserError where the wanted one is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {wanted}: there is no GPU here; give cpu or auto")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"--device {wanted} is unknown: give auto, cuda or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {wanted}: there are {torch.cuda.device_count()} GPUs here, from cuda:0 on")
    return device


def load_pipeline(location: Path | str, device: torch.device, vae_location: Path | str | None = None) -> DiffusionPipeline:
    """The pipeline of a folder or a Hub id, with another VAE where --vae-checkpoint names one."""
    try:
        pipe = DiffusionPipeline.from_pretrained(
            location, trust_remote_code=True, use_safetensors=True, local_files_only=isinstance(location, Path)
        )
    except (OSError, ValueError, ImportError) as error:
        way_out = "give the --output-dir of a train_unet.py run, or a Hub id"
        raise UserError(f"--pipeline {location} cannot be loaded ({first_line(error)}): {way_out}") from None
    if "class_names" not in pipe.config:
        raise UserError(f"--pipeline {location} is a {type(pipe).__name__}: give one that train_unet.py wrote")
    if vae_location:
        vae = load_vae(vae_location)
        if any(key(vae) != key(pipe.vae) for key in (weights_key, config_key, scale_key)):
            if vae.config.latent_channels != pipe.vae.config.latent_channels:
                raise UserError(f"--vae-checkpoint {vae_location} has other latents than the pipeline's VAE: leave the flag out")
            print("notice: --vae-checkpoint is not the VAE that this UNet was trained with: the pictures may be garbage")
            pipe.register_modules(vae=vae)
    return pipe.to(device)


def pick_labels(pipe: DiffusionPipeline, classes: Sequence[str], num_images: int) -> list[int] | None:
    """A label for each picture: the wanted classes, by name or by their number in the data, or all, in turn. None for a model without
    classes. A pipeline of an earlier version does not know the numbers: there labels count, from 0."""
    names = {int(label): name for label, name in (pipe.config.class_names or {}).items()}
    if not names:
        if classes:
            raise UserError("--class: this model was trained without classes; leave the flag out")
        return None
    numbers = {int(label): number for label, number in (getattr(pipe.config, "class_numbers", None) or {}).items()}
    label_of = {numbers.get(label, label): label for label in names}
    wanted = []
    for word in classes:
        label = next((label for label, name in names.items() if name == word), label_of.get(int(word)) if word.isdigit() else None)
        if label is None:
            there = ", ".join(f"{number} {names[label]}" for number, label in label_of.items())
            raise UserError(f"--class {word} is unknown: the classes are {there}")
        wanted.append(label)
    return list(islice(cycle(wanted or names), num_images))
