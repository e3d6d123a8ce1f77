"""Draw samples from a pipeline in batches."""

from collections.abc import Iterator, Sequence
from itertools import cycle, groupby, islice

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from corel_diffusers.config.commands import Sampling
from corel_diffusers.files import UserError, is_out_of_memory
from corel_diffusers.runtime.precision import autocast
from corel_diffusers.sampling.pipelines import sample_size_px


def sample_images(
    pipe: DiffusionPipeline,
    args: Sampling,
    labels: list[int] | None,
    seed: int,
    sizes_px: list[tuple[int, int]] | None = None,
    **options: object,
) -> Iterator[Image.Image]:
    """Generate samples in batches and yield them one by one. Each has its own random generator: `seed + index`.

    Args:
        labels: one label per sample, or None for an unconditional model.
        sizes_px: the (height, width) of each sample. A batch has one size: sort the samples by size. None: the default
            size of the pipeline.
        options: more arguments for the pipeline.

    Raises:
        UserError: there is not enough memory for a batch.
    """
    names = {int(label): name for label, name in (pipe.config.class_names or {}).items()}
    pipe.set_progress_bar_config(desc="denoising", leave=False, mininterval=1)
    sizes_px = sizes_px or [sample_size_px(pipe)] * args.num_images
    same_size = (list(indices) for _, indices in groupby(range(args.num_images), sizes_px.__getitem__))
    batches = [
        indices[start : start + args.batch_size]
        for indices in same_size
        for start in range(0, len(indices), args.batch_size)
    ]
    for indices in tqdm(batches, "generating", leave=False, disable=len(batches) == 1):
        try:
            with autocast(args.mixed_precision, pipe.device.type):
                output = pipe(
                    len(indices),
                    [names[labels[index]] for index in indices] if labels else None,
                    generator=[torch.Generator().manual_seed(seed + index) for index in indices],
                    guidance_scale=args.guidance_scale,
                    guidance_interval=guidance_interval(args, pipe),
                    **size_options(pipe, sizes_px[indices[0]]),
                    **options,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"out of memory with --batch-size {args.batch_size}: give a smaller one") from None
        yield from output.images


def size_options(pipe: DiffusionPipeline, size_px: tuple[int, int]) -> dict[str, int]:
    """Return the arguments of the pipeline for samples of this (height, width). There are none for its default size."""
    # pipelines of earlier versions do not have these arguments, and draw in one size
    return {} if size_px == sample_size_px(pipe) else {"height": size_px[0], "width": size_px[1]}


def guidance_interval(args: Sampling, pipe: DiffusionPipeline) -> tuple[float, float]:
    """Return the lowest and the highest noise level at which guidance acts, from 0 (clean) to 1 (pure noise)."""
    # pipelines of earlier versions have no default interval: their guidance acts at all noise levels
    return args.guidance_interval or getattr(pipe, "default_guidance_interval", (0.0, 1.0))


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
            label_of_number.get(int(class_)) if class_.isdecimal() and len(class_) < 10 else None,
        )
        if label is None:
            known = ", ".join(f"{number} {names[label]}" for number, label in label_of_number.items())
            raise UserError(f"--class {class_} is unknown: the classes are {known}")
        chosen.append(label)
    return list(islice(cycle(chosen or names), num_images))
