"""Choose the flags that the user left unset, from the photos, the measured speed of the machine and the available time.

A series lists the presets of a model, smallest first. A run uses the largest preset that can see enough images in the
available time to benefit from its size.
"""

import gc
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from accelerate import Accelerator
from datasets import DatasetDict

from corel_diffusers.config.checks import flag_name
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.pixels import native_side_px
from corel_diffusers.files import UserError, is_out_of_memory, read_json
from corel_diffusers.runtime.devices import device_name
from corel_diffusers.runtime.precision import resolve_precision, set_precision
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.runtime.timing import MIN_SPEEDUP, photos_per_second
from corel_diffusers.training.presets import SPEED_WITH_DISCRIMINATOR, Preset, PresetSeries

# augmented crops of each photo; a run uses them if it sees each photo more often than CROPS_FROM_REPEATS times;
# benchmarks/overfitting.py
NUM_CROPS, CROPS_FROM_REPEATS = 16, 300
# Minimum batch size on a GPU. A small model's step takes about the same time there with 16 photos as with 2, because
# starting the kernels takes most of it (benchmarks/results/choices.md, "The presets for GPUs").
GPU_BATCH = 16
# On a CPU, each preset is assumed to be at least this many times slower than the one below it. If a preset would then
# be too slow, it is not timed.
CPU_SLOWDOWN = 3
# (config, size (height, width), batch size, attention kernel) -> a function that makes one training step of such a
# model, on zeros
TrialStep = Callable[[str, tuple[int, int], int, str], Callable[[], None]]


def plan_run(
    flags: TrainingArguments,
    accelerator: Accelerator,
    photos: DatasetDict,
    series: PresetSeries,
    trial_step: TrialStep,
    size_px: tuple[int, int] | None,
) -> TrainingArguments:
    """Return the arguments of the run: the flags, with a value for each flag that the user left unset.

    A resumed run uses the plan that it began with. Otherwise `choose_settings` and `fastest_precision` choose.
    With --plan, print the plan and exit before anything is written.

    size_px: the image size (height, width) if a flag or the VAE of the UNet already determines it.
    """
    run = flags.run_dir / "run.json"
    plan = broadcast_from_main(accelerator, read_json(run).get("plan") if flags.resume and run.is_file() else None)
    flags = resolve_timed_flags(flags, accelerator.device.type)
    if plan:
        accelerator.print("plan: the settings that the run began with")
        plan = {"mixed_precision": "bf16", "attention": "fused"} | plan  # older versions did not save these two
        if flags.change_precision:  # it is chosen again, for this machine
            plan = {name: value for name, value in plan.items() if name not in flags.timed}
    elif flags.plan or None in flags.planned.values():
        plan = choose_settings(flags, accelerator, photos, series, trial_step, size_px)
        plan = broadcast_from_main(accelerator, plan)
    args = flags.resolved(plan or {})
    if "auto" in args.timed.values():
        step = partial(trial_step, args.config, size_px or args.size_px, args.batch_size)
        _, precision, attention = broadcast_from_main(
            accelerator, fastest_precision(args, accelerator, step, args.batch_size)
        )
        args = replace(args, mixed_precision=precision, attention=attention)
    # raises UserError if a run that began in fp16 on a GPU is resumed on a machine without a GPU
    resolve_precision(args.mixed_precision, accelerator.device.type)
    set_precision(accelerator, args.mixed_precision)
    if accelerator.device.type == "cuda":
        # free the memory of the trials, so that the peak memory of the run does not include it
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if args.plan:
        accelerator.end_training()
        sys.exit(0)
    return args


def resolve_timed_flags(flags: TrainingArguments, device_type: str) -> TrainingArguments:
    """Return the flags with the precision and the attention kernel of the run.

    On a CPU with bf16, "auto" stays: the fastest combination depends on the machine and on the model, so a few steps
    are timed later.
    """
    precision = resolve_precision(flags.mixed_precision, device_type)
    if precision != "bf16" or device_type == "cuda":
        # a GPU has its own kernels
        attention = "fused" if flags.attention == "auto" or device_type != "cpu" else flags.attention
        return replace(flags, mixed_precision=precision, attention=attention)
    is_launched_in_bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == precision
    return replace(flags, mixed_precision=precision) if is_launched_in_bf16 else flags


def choose_settings(
    flags: TrainingArguments,
    accelerator: Accelerator,
    photos: DatasetDict,
    series: PresetSeries,
    trial_step: TrialStep,
    size_px: tuple[int, int] | None,
) -> dict:
    """Return the values of the unset flags by name, and print the plan.

    Training steps are timed only if the choice depends on the speed, or if --plan is given.
    """
    num_photos = len(photos["train"])
    minutes = flags.max_train_minutes or series.minutes
    side_px = math.inf if size_px else native_side_px(photos)
    presets = possible_presets(flags, accelerator, series, num_photos, side_px)
    ends_by_time = not (flags.epochs or flags.max_train_steps)
    recipe_unset = None in (
        value for name, value in flags.planned.items() if name not in (*TrainingArguments.PLANNED, *flags.length)
    )
    chosen, rate, timed = presets[0], None, {}
    if flags.plan or len(presets) > 1 or (ends_by_time and recipe_unset):
        chosen, rate, timed = largest_useful_preset(
            flags, accelerator, presets, num_photos, 60 * minutes, trial_step, size_px
        )

    size = size_px or (chosen.side_px,) * 2
    images_seen = (
        60 * minutes * rate if ends_by_time and rate else requested_images(flags, chosen, accelerator, num_photos)
    )
    plan = {
        "config": chosen.config,
        "image_size": str(chosen.side_px),
        "batch_size": chosen.batch_size,
        "max_train_minutes": minutes,
    }
    plan["views"] = NUM_CROPS if images_seen > CROPS_FROM_REPEATS * num_photos else 0
    if series.recipe and chosen.config == series.presets[0].config and flags.config in (None, chosen.config):
        plan |= series.recipe(images_seen / planned_global_batch(flags, chosen, accelerator), size)
    adversarial = flags.planned.get("adversarial_weight", 0)
    if rate and (plan.get("adversarial_weight") if adversarial is None else adversarial):
        rate *= SPEED_WITH_DISCRIMINATOR
        images_seen = 60 * minutes * rate if ends_by_time else images_seen
    unset = [name for name, given in flags.planned.items() if given is None and not (name == "image_size" and size_px)]
    plan = {name: plan[name] for name in unset if name in plan}
    plan |= {name: value for name, value in timed.items() if flags.timed[name] == "auto"}
    planned_flags = " ".join(f"{flag_name(name)} {value}" for name, value in plan.items())
    accelerator.print(f"plan: {planned_flags or 'all settings are given by flags'}")
    if rate:
        for line in (
            speed_line(accelerator, flags, chosen, size, num_photos, images_seen, rate),
            expectation(flags, series, chosen, size_px, images_seen),
        ):
            accelerator.print(f"      {line}")
    return plan


def possible_presets(
    flags: TrainingArguments, accelerator: Accelerator, series: PresetSeries, num_photos: int, side_px: float
) -> list[Preset]:
    """Return the presets that fit --config, the number of photos and their side in pixels, smallest first."""
    # the speed of a JSON config is not known, so it is planned like the smallest preset
    presets = [preset for preset in series.presets if flags.config in (None, preset.config)] or [series.presets[0]]
    fitting = [preset for preset in presets if preset.min_photos <= num_photos and preset.side_px <= side_px]
    presets = fitting or presets[:1]
    if accelerator.device.type != "cuda" or flags.epochs:  # with --epochs, a larger batch would mean fewer steps
        return presets
    return [
        preset if preset.batch_size >= GPU_BATCH else preset._replace(batch_size=GPU_BATCH, reached=())
        for preset in presets
    ]


def largest_useful_preset(
    flags: TrainingArguments,
    accelerator: Accelerator,
    presets: list[Preset],
    num_photos: int,
    seconds: float,
    trial_step: TrialStep,
    size_px: tuple[int, int] | None,
) -> tuple[Preset, float | None, dict[str, str]]:
    """Time the presets, smallest first, and return the largest one that sees enough images in the length of the run.

    Returns:
        The preset, its photos per second on all processes (None if it could not be timed), and its values of
        --mixed-precision and --attention.
    """
    chosen, rate, timed = presets[0], None, {}
    for preset in presets:
        is_larger = preset is not presets[0]
        # This is for training on a CPU. On a GPU, a larger model with larger batches can process more photos/s.
        too_slow = (
            is_larger and accelerator.device.type == "cpu" and seconds * rate < CPU_SLOWDOWN * preset.min_images_seen
        )
        requested = requested_images(flags, preset, accelerator, num_photos)
        if is_larger and (too_slow or requested < preset.min_images_seen):
            break
        batch_size = flags.batch_size or preset.batch_size
        accelerator.print(f"timing training steps with --config {flags.config or preset.config}")
        try:
            step = partial(trial_step, flags.config or preset.config, size_px or (preset.side_px,) * 2, batch_size)
            measured_rate, precision, attention = fastest_precision(flags, accelerator, step, batch_size)
            measured_rate *= accelerator.num_processes
        except (RuntimeError, MemoryError, UserError) as error:
            # The preset needs too much memory, or it has no model for this image size. If it is the first preset, the
            # run itself will raise this error.
            if isinstance(error, UserError) or is_out_of_memory(error):
                break
            raise
        if not is_larger or seconds * measured_rate >= preset.min_images_seen:
            chosen, rate, timed = preset, measured_rate, {"mixed_precision": precision, "attention": attention}
    return chosen, rate, timed


def fastest_precision(
    args: TrainingArguments,
    accelerator: Accelerator,
    trial_step: Callable[[str], Callable[[], None]],
    batch_size: int,
) -> tuple[float, str, str]:
    """Time training steps, and return (photos per second, --mixed-precision, --attention) of the fastest combination.

    On a CPU with bf16 in hardware, bf16 halves the time of a large model's step, but a small model becomes slower. In
    bf16, fused attention can be slower than plain matrix products.

    If both flags are set, there is one combination. Otherwise the first one is kept unless another is MIN_SPEEDUP times
    faster, so that timing noise does not give the same command different settings.

    trial_step: takes the attention kernel.
    """
    precisions = ("bf16", "no") if args.mixed_precision == "auto" else (args.mixed_precision,)
    kernels = ("fused", "math") if args.attention == "auto" else (args.attention,)
    rates = {}
    for precision, attention in product(precisions, kernels):
        if precision == "bf16" or attention == kernels[0]:
            if accelerator.device.type == "cuda":
                gc.collect()  # frees the previous trial: its CUDA graphs are in a reference cycle
            set_precision(accelerator, precision)
            rates[precision, attention] = photos_per_second(trial_step(attention), batch_size)
    if len(rates) > 1:
        milliseconds = {key: 1e3 * batch_size / rate for key, rate in rates.items()}
        timings = ", ".join(
            f"{'float32' if name == 'no' else name} with {kernel} attention {value:{',.0f' if value > 100 else '.3g'}}"
            for (name, kernel), value in milliseconds.items()
        )
        accelerator.print(f"ms per step: {timings}")
    best = next(iter(rates))
    for combination, rate in rates.items():
        if rate > MIN_SPEEDUP * rates[best]:
            best = combination
    return rates[best], *best


def requested_images(args: TrainingArguments, preset: Preset, accelerator: Accelerator, num_photos: int) -> float:
    """Return the images seen in --max-train-steps or --epochs, or infinity if the run ends by time."""
    if args.max_train_steps:
        return args.max_train_steps * planned_global_batch(args, preset, accelerator)
    return args.epochs * num_photos if args.epochs else math.inf


def planned_global_batch(args: TrainingArguments, preset: Preset, accelerator: Accelerator) -> int:
    """Return the global batch of a run with this preset: batch size x accumulation x processes."""
    return (args.batch_size or preset.batch_size) * args.grad_accum * accelerator.num_processes


def speed_line(
    accelerator: Accelerator,
    args: TrainingArguments,
    preset: Preset,
    size_px: tuple[int, int],
    num_photos: int,
    images_seen: float,
    rate: float,
) -> str:
    """Return the line that tells the user the speed (`rate` in photos per second) and the length of the run."""
    height, width = size_px
    steps = images_seen / planned_global_batch(args, preset, accelerator)
    speed = f"{rate:,.0f} photos/s of {height}x{width} px"
    times, minutes = images_seen / num_photos, images_seen / rate / 60
    images = (
        f"{images_seen:,.0f} images seen in {steps:,.0f} steps, "
        f"each of the {num_photos:,} photos {f'{times:,.0f} times' if times >= 1 else 'less than once'}"
    )
    duration = f"{minutes:,.0f} minutes" if minutes >= 2 else f"{minutes:.1f} minutes"
    return f"{device_name(accelerator)} trains on about {speed}: {duration}, {images}"


def expectation(
    args: TrainingArguments, series: PresetSeries, preset: Preset, size_px: tuple[int, int] | None, images_seen: float
) -> str:
    """Return the line that tells the user which quality a similar run reached, if one was measured."""
    reached = [(seen, value) for seen, value in preset.reached if seen <= 1.2 * images_seen]
    other_model = args.config not in (None, preset.config) or getattr(args, "downsample", None)
    if other_model or size_px not in (None, (preset.side_px, preset.side_px)) or not reached:
        hint = {"vae": "the log prints the PSNR", "unet": "use --evaluate-every or `corel-diffusers evaluate`"}
        return f"expect: no similar run has been measured: {hint[args.MODEL]}"
    seen, value = reached[-1]
    return f"expect: {series.measure.format(value)}, as measured on 221 Corel photos after {seen:,} images seen"
