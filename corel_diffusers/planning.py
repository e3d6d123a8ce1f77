"""What a run should be, from the photos, the machine's measured speed and the minutes: the flags that the user left open.

A ladder has the sizes of a model, the cheapest first. A run takes the highest rung whose training can see enough pictures in its
time to be worth the size.
"""

import gc
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import DatasetDict

from corel_diffusers.arguments import TrainingArguments
from corel_diffusers.data.transforms import native_side_px
from corel_diffusers.files import UserError, is_out_of_memory, read_json
from corel_diffusers.precision import resolve_precision, use
from corel_diffusers.processes import of_main_process
from corel_diffusers.training import device_name


class Rung(NamedTuple):
    """A size of model. pictures: so many its training has to see; photos: so many there must be, or it learns them by heart; reached:
    pictures seen -> the measure, of 221 Corel photos at this size."""

    config: str
    side_px: int
    batch_size: int
    pictures: int = 0
    photos: int = 0
    reached: tuple[tuple[int, float], ...] = ()


class Ladder(NamedTuple):
    """The rungs for one script, its minutes where no length is given, what a rung is measured by, and what the first one needs."""

    rungs: tuple[Rung, ...]
    minutes: float
    measure: str
    recipe: Callable[[float, tuple[int, int]], dict] | None = None  # steps, size (height, width) -> more flags


def vae_recipe(steps: float, size_px: tuple[int, int]) -> dict:
    """What a VAE gains from once it trains for so many steps; before, these cost more than they give."""
    if steps < ADVERSARIAL_FROM:
        return {}
    return {"perceptual_weight": 1.0, "kl_weight": 0.2 / math.prod(size_px), "adversarial_weight": 0.3}


# reached: `tiny` by benchmarks/contest.py and shorter and longer runs, `base` by benchmarks/results/choices.md, "The presets for GPUs"
VAE_LADDER = Ladder(
    # a base VAE is good sooner (benchmarks/results/choices.md), but the UNet that follows has four times the work at its size
    (
        Rung("tiny", 64, 2, reached=((3_800, 23.6), (27_000, 25.0))),
        Rung("base", 128, 16, 40_000, reached=((9_100, 25.7),)),
        Rung("large", 256, 16, 200_000, 5_000),
    ),
    20,
    "held-out PSNR {:.1f} dB",
    vae_recipe,
)
UNET_LADDER = Ladder(
    (
        Rung("tiny", 64, 16, reached=((64_000, 50), (148_000, 45))),
        Rung("base", 128, 16, 100_000),
        Rung("large", 256, 32, 1_000_000, 5_000),
    ),
    40,
    "KID x1000 {:.0f} against held-out photos, where real photos have about 0",
)
VIEWS, VIEWS_FROM = 16, 300  # changed views of each photo, where a run would see each photo more often; benchmarks/overfitting.py
# benchmarks/results/choices.md, "Two hours"
ADVERSARIAL_FROM, WITH_DISCRIMINATOR = 15_000, 0.75  # steps, and the share of a run's pictures that the discriminator leaves time for
# photos a step at least: starting a small model's work is what a GPU's step takes, and no fewer steps are made of more photos each
# (benchmarks/results/choices.md, "The presets for GPUs")
GPU_BATCH = 16
CLEARLY = 1.05  # times as fast: timings of a quiet machine differ by less
STEEPNESS = 3  # on a CPU, a rung is at least so many times as slow as the one below: one that this rules out is not tried

# config, size (height, width), batch size -> a training step of such a model, on noise
TrialStep = Callable[[str, tuple[int, int], int], Callable[[], None]]


def settle(
    args: TrainingArguments,
    accelerator: Accelerator,
    photos: DatasetDict,
    ladder: Ladder,
    trial_step: TrialStep,
    size_px: tuple[int, int] | None,
) -> None:
    """Decides what is open of the flags that a plan can decide: as the run that is resumed was begun, else as `choose` and
    `fastest` find. size_px: where it is decided, by a flag or by the UNet's VAE.

    With --plan the plan is printed and the script ends: nothing has been written.
    """
    run = args.run_dir / "run.json"
    plan = of_main_process(accelerator, read_json(run).get("plan") if args.resume and run.is_file() else None)
    if plan:
        accelerator.print("plan: as the run was begun")
        plan = {"mixed_precision": "bf16", "attention": "fused"} | plan  # which older runs did not note
    elif args.plan or None in args.planned.values():
        plan = of_main_process(accelerator, choose(args, accelerator, photos, ladder, trial_step, size_px))
    args.fill(plan or {})
    if "auto" in args.timed.values():
        step = partial(trial_step, args.config, size_px or args.size_px, args.batch_size)
        _, args.mixed_precision, args.attention = of_main_process(accelerator, fastest(args, accelerator, step, args.batch_size))
    resolve_precision(args.mixed_precision, accelerator.device.type)  # a run begun on a GPU does not go on without one
    use(accelerator, args.mixed_precision, args.attention)
    if accelerator.device.type == "cuda":  # what was tried is neither in the run's way nor counted as its own
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if args.plan:
        accelerator.end_training()
        sys.exit(0)


def choose(
    args: TrainingArguments,
    accelerator: Accelerator,
    photos: DatasetDict,
    ladder: Ladder,
    trial_step: TrialStep,
    size_px: tuple[int, int] | None,
) -> dict:
    """The open flags, by name, printed with what they come to. Speed is measured only where the choice, or --plan, needs it."""
    count = len(photos["train"])
    minutes = args.max_train_minutes or ladder.minutes
    side_px = math.inf if size_px else native_side_px(photos)
    rungs = [rung for rung in ladder.rungs if args.config in (None, rung.config)] or [ladder.rungs[0]]  # a JSON's size: anyone's guess
    rungs = [rung for rung in rungs if rung.photos <= count and rung.side_px <= side_px] or rungs[:1]
    if accelerator.device.type == "cuda" and not args.epochs:  # which would be over in an eighth of the steps
        rungs = [rung if rung.batch_size >= GPU_BATCH else rung._replace(batch_size=GPU_BATCH, reached=()) for rung in rungs]

    chosen, rate, way = rungs[0], None, {}
    timed = not (args.epochs or args.max_train_steps)
    recipe_open = None in (value for name, value in args.planned.items() if name not in (*TrainingArguments.PLANNED, *args.length))
    matters = len(rungs) > 1 or (timed and recipe_open)
    for rung in rungs if args.plan or matters else ():
        higher = rung is not rungs[0]
        # a GPU waits for the CPU in small models, so that a larger one in larger batches may be the faster
        too_steep = higher and accelerator.device.type == "cpu" and 60 * minutes * rate < STEEPNESS * rung.pictures
        if higher and (too_steep or asked_for(args, rung, accelerator, count) < rung.pictures):
            break
        batch_size = args.batch_size or rung.batch_size
        try:
            step = partial(trial_step, args.config or rung.config, size_px or (rung.side_px,) * 2, batch_size)
            measured, precision, attention = fastest(args, accelerator, step, batch_size)
            measured *= accelerator.num_processes
        except (RuntimeError, MemoryError, UserError) as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                break  # too large for the machine, or no model for such a size: of the first rung, the run itself will say so
            raise
        if not higher or 60 * minutes * measured >= rung.pictures:
            chosen, rate, way = rung, measured, {"mixed_precision": precision, "attention": attention}

    size = size_px or (chosen.side_px,) * 2
    seen = 60 * minutes * rate if timed and rate else asked_for(args, chosen, accelerator, count)
    plan = {"config": chosen.config, "image_size": str(chosen.side_px), "batch_size": chosen.batch_size, "max_train_minutes": minutes}
    plan["views"] = VIEWS if seen > VIEWS_FROM * count else 0
    if ladder.recipe and chosen.config == ladder.rungs[0].config and args.config in (None, chosen.config):
        plan |= ladder.recipe(seen / photos_a_step(args, chosen, accelerator), size)
    adversarial = args.planned.get("adversarial_weight", 0)
    if rate and (plan.get("adversarial_weight") if adversarial is None else adversarial):
        rate *= WITH_DISCRIMINATOR
        seen = 60 * minutes * rate if timed else seen
    open_flags = [name for name, given in args.planned.items() if given is None and not (name == "image_size" and size_px)]
    plan = {name: plan[name] for name in open_flags if name in plan}
    plan |= {name: value for name, value in way.items() if args.timed[name] == "auto"}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in plan.items())
    accelerator.print(f"plan: {flags or 'as the flags say'}")
    if rate:
        for line in (speed_line(accelerator, args, chosen, size, count, seen, rate), expectation(args, ladder, chosen, size_px, seen)):
            accelerator.print(f"      {line}")
    return plan


def fastest(
    args: TrainingArguments, accelerator: Accelerator, trial_step: Callable[[], Callable[[], None]], batch_size: int
) -> tuple[float, str, str]:
    """The photos a second of training steps, and the --mixed-precision and --attention with which they are the most.

    On a CPU with bf16 in hardware, that halves a large model's step and slows a small one's, and in it fused attention may be slower than
    the plain products. Where both flags are decided there is one way. Two runs of one command should not differ by the clock's noise, so
    the first of the ways stays unless another is CLEARLY faster.
    """
    precisions = ("bf16", "no") if args.mixed_precision == "auto" else (args.mixed_precision,)
    kernels = ("fused", "math") if args.attention == "auto" else (args.attention,)
    rates = {}
    for precision, attention in product(precisions, kernels):
        if precision == "bf16" or attention == kernels[0]:
            if accelerator.device.type == "cuda":
                gc.collect()  # what was tried before: a recorded pass is its own owner
            use(accelerator, precision, attention)
            rates[precision, attention] = photos_per_second(trial_step(), batch_size)
    if len(rates) > 1:
        told = ", ".join(f"{name} with {kernel} attention {1e3 * batch_size / rate:.3g}" for (name, kernel), rate in rates.items())
        accelerator.print(f"ms a step: {told}")
    best = next(iter(rates))
    for way, rate in rates.items():
        if rate > CLEARLY * rates[best]:
            best = way
    return rates[best], *best


def asked_for(args: TrainingArguments, rung: Rung, accelerator: Accelerator, count: int) -> float:
    """The pictures that --epochs or --max-train-steps ask for; no end of them where the time decides."""
    if args.max_train_steps:
        return args.max_train_steps * photos_a_step(args, rung, accelerator)
    return args.epochs * count if args.epochs else math.inf


def photos_a_step(args: TrainingArguments, rung: Rung, accelerator: Accelerator) -> int:
    """The global batch of a run with that rung."""
    return (args.batch_size or rung.batch_size) * args.grad_accum * accelerator.num_processes


def speed_line(
    accelerator: Accelerator,
    args: TrainingArguments,
    rung: Rung,
    size_px: tuple[int, int],
    count: int,
    pictures: float,
    rate: float,
) -> str:
    """What the machine does in the time, for people."""
    height, width = size_px
    steps = pictures / photos_a_step(args, rung, accelerator)
    speed = f"{rate:,.0f} photos/s of {height}x{width} px"
    looks = f"{pictures:,.0f} pictures in {steps:,.0f} steps: each of the {count:,} photos {pictures / count:,.0f} times"
    return f"{device_name(accelerator)} does about {speed}: {pictures / rate / 60:,.0f} minutes, {looks}"


def expectation(args: TrainingArguments, ladder: Ladder, rung: Rung, size_px: tuple[int, int] | None, pictures: float) -> str:
    """What a run of that length was measured to reach, where one was."""
    reached = [(seen, value) for seen, value in rung.reached if seen <= 1.2 * pictures]
    other_model = args.config not in (None, rung.config) or getattr(args, "downsample", None)
    if other_model or size_px not in (None, (rung.side_px, rung.side_px)) or not reached:
        return "expect: no run like this has been measured; --evaluate-every and `corel-diffusers evaluate` tell"
    seen, value = reached[-1]
    return f"expect: {ladder.measure.format(value)}, as measured on 221 Corel photos after {seen:,} pictures"


def photos_per_second(step: Callable[[], None], batch_size: int, seconds: float = 1.0) -> float:
    """The speed of training steps, after one to warm up."""

    def run(least: float) -> tuple[int, float]:
        steps, began = 0, time.perf_counter()
        while not steps or time.perf_counter() - began < least:
            step()
            steps += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return steps, time.perf_counter() - began

    run(0)
    steps, spent = run(seconds)
    return steps * batch_size / spent
