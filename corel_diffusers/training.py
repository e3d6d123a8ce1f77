"""The parts that both training loops share: device, run length, EMA, compilation, metrics, stopping.

These are functions and small classes. The loops themselves are in train_vae.py and train_unet.py.
"""

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    parse_flag_from_env,
)
from datasets import DatasetDict
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from corel_diffusers.arguments import TrainingArguments
from corel_diffusers.batches import BatchPlan
from corel_diffusers.checkpoints import RunState, find_checkpoints
from corel_diffusers.data.cache import SINGLE_PROCESS, Share
from corel_diffusers.files import (
    ENTRY_FILES,
    UserError,
    finish_model_save,
    first_line,
    is_out_of_memory,
    read_metrics,
    require_writable,
    write_json,
    write_text,
)
from corel_diffusers.precision import resolve_precision
from corel_diffusers.processes import broadcast_from_main
from corel_diffusers.sharding import full_tensor, is_sharded

TRAINING_PHOTOS = "training_photos.txt"  # in the run folder: the names of the photos that the model is trained on
SLOW_START_FRACTION = 0.2  # if preparing the photos takes more than this fraction of the minutes, print a notice
CHECKPOINT_SECONDS = 600  # maximum time between checkpoints, so a crash loses at most this much training
SYNC_EVERY = 10  # steps between two exchanges of the time and of stop signals among the ranks


# --- the run: device, precision, folder -------------------------------------------------------------------------------


def start_run(args: TrainingArguments) -> Accelerator:
    """Check the arguments and return the Accelerator: device, precision, processes and trackers.

    Raises:
        UserError: the run cannot start. Nothing has been built or written then.
    """
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = resolve_precision(args.mixed_precision, "cuda" if gpu else "cpu")
    # A CPU with bf16: planning.fastest_precision times the choices, because the fastest one depends on the machine and
    # the model.
    is_timed = precision == "bf16" and not gpu
    if not is_timed or os.environ.get("ACCELERATE_MIXED_PRECISION") == precision:
        args.mixed_precision = precision
    if not is_timed and args.attention == "auto":
        args.attention = "fused"
    if not args.plan and os.environ.get("RANK", "0") == "0":  # only the main process writes
        require_writable(args.run_dir, "--output-dir")
    begun = read_metrics(args.run_dir / "metrics.jsonl") or find_checkpoints(args.run_dir)
    if begun and not args.resume and not args.plan:
        hint = "give --resume latest to continue it, or another --output-dir"
        raise UserError(f"--output-dir {args.run_dir} already holds a run: {hint}")
    entry_file = next((name for name in ENTRY_FILES if (args.run_dir / name).exists()), None)
    # for example a downloaded model, which the run would overwrite
    if entry_file and not (args.run_dir / "run.json").is_file() and not args.plan:
        raise UserError(
            f"--output-dir {args.run_dir} holds a {entry_file} that was not written by a run: give another folder"
        )
    if args.compile:
        require_compiler("cuda" if gpu else "cpu")
    refuse_other_launchers()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=precision,
        # a plugin, because the environment of `accelerate launch` overrides a plain number
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.grad_accum),
        # the other ranks wait while photos are encoded or samples are generated
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(args.run_dir), logging_dir=str(args.run_dir / "logs")),
    )
    if len(precisions := set(gather_object([precision]))) > 1:
        raise UserError(
            f"--mixed-precision {args.mixed_precision}: the machines of this run support different precisions "
            f"({' and '.join(sorted(precisions))}): give --mixed-precision no"
        )
    launcher_steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launcher_steps not in ("1", "auto", str(args.grad_accum)):
        accelerator.print(
            f"notice: accelerate launch asks for {launcher_steps} gradient accumulation steps, "
            f"but the run uses --grad-accum {args.grad_accum}"
        )
    accelerator.print(f"running on {device_name(accelerator)}" + ("" if is_timed else f", mixed precision {precision}"))
    return accelerator


def refuse_other_launchers() -> None:
    """Raise an error if `accelerate launch` asks for a kind of distributed training that the scripts do not support.

    Raises:
        UserError: DeepSpeed or Megatron-LM is requested.
    """
    for name, kind in {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate launch: {kind} is not supported: "
                "launch with --multi_gpu (DDP) or --use_fsdp --fsdp_version 2"
            )


def device_name(accelerator: Accelerator) -> str:
    """Return a readable name of the hardware that the run uses, for example "2 x NVIDIA L4" or "CPU (8 threads)"."""
    gpu = accelerator.device.type == "cuda"
    name = (
        torch.cuda.get_device_name()
        if gpu
        else f"{accelerator.device.type.upper()} ({torch.get_num_threads()} threads)"
    )
    return f"{accelerator.num_processes} x {name}" if accelerator.num_processes > 1 else name


def process_share(accelerator: Accelerator) -> Share:
    """Return the place of this process among the processes that fill the caches together.

    Each machine has its own caches. The processes of one machine divide the photos among them.
    """
    if accelerator.num_processes == 1:
        return SINGLE_PROCESS
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return Share(accelerator.local_process_index, processes, accelerator.wait_for_everyone)


def print_data_and_model(accelerator: Accelerator, photos: DatasetDict, size_px: tuple[int, int], model: str) -> None:
    """Print the data and the model before the first step."""
    classes = photos["train"].features["label"].names
    counts = (
        f"{len(photos['train'])} training photos, {len(photos['validation'])} held-out photos, {len(classes)} classes"
    )
    accelerator.print(f"{counts}, {size_px[0]}x{size_px[1]} px; {model}")


# --- run length and intervals -----------------------------------------------------------------------------------------


@dataclass
class RunLength:
    """The length of a run: a number of steps or of seconds. The seconds include the time before a resume."""

    steps: int | None
    seconds: float | None
    began: float  # time.monotonic() at the start; for a resumed run, as if it had never been interrupted
    previous_seconds: float = math.inf  # state.seconds before the last tick

    @classmethod
    def of(
        cls, args: TrainingArguments, plan: BatchPlan, accelerator: Accelerator, state: "RunState", began: float
    ) -> "RunLength":
        """Return the length that the flags give.

        Args:
            began: time.monotonic() at the start of this process.

        Raises:
            UserError: the minutes of the run are over before its first step.
        """
        if not args.max_train_minutes:
            return cls(args.max_train_steps or args.epochs * plan.steps_per_epoch, None, began - state.seconds)
        seconds, spent = 60 * args.max_train_minutes, broadcast_from_main(accelerator, time.monotonic() - began)
        duration = f"decoding and encoding the photos took {spent / 60:.1f} of the {args.max_train_minutes:g} minutes"
        if not state.step and spent >= seconds:
            raise UserError(
                f"--max-train-minutes {args.max_train_minutes:g}: {duration}; the result is cached: "
                "start the same command again"
            )
        if not state.step and spent > SLOW_START_FRACTION * seconds:
            accelerator.print(
                f"notice: {duration}; the result is cached: "
                "if you start the same command again, it has all its minutes for training"
            )
        return cls(None, seconds, began - state.seconds)

    def tick(self, state: "RunState", accelerator: Accelerator) -> None:
        """Update the elapsed time in the state, after each step.

        The time decides about checkpoints and the end of the run, so all ranks must have the same time. With several
        ranks, they get the time of the main process every SYNC_EVERY steps.
        """
        self.previous_seconds = state.seconds
        if accelerator.num_processes == 1:
            state.seconds = time.monotonic() - self.began
        elif state.step % SYNC_EVERY == 0:
            state.seconds = broadcast_from_main(accelerator, time.monotonic() - self.began)

    def total_steps(self, state: "RunState") -> int:
        """Return the number of steps of the full run. If the run ends by time, estimate it from the speed so far."""
        return self.steps or max(state.step + 1, round(state.step * self.seconds / max(state.seconds, 1e-9)))

    def fraction_done(self, state: "RunState") -> float:
        """Return the fraction of the run that is done, from 0 to 1."""
        return state.step / self.steps if self.steps else state.seconds / self.seconds

    def reached(self, state: "RunState") -> bool:
        """Return whether the run has reached its end."""
        return self.fraction_done(state) >= 1


def checkpoint_due(args: TrainingArguments, plan: BatchPlan, state: "RunState", length: RunLength) -> bool:
    """Return whether to save a checkpoint after this step.

    --checkpoint-every is the number of epochs between checkpoints. If it is unset, a checkpoint is saved every ten
    minutes. A run that ends by time then saves one after each tenth of its time, if that is sooner. Any other run also
    saves one every CHECKPOINT_EVERY epochs.
    """
    if args.checkpoint_every:
        return plan.ends_epoch(state.step, args.checkpoint_every)
    interval = min(length.seconds / 10, CHECKPOINT_SECONDS) if length.seconds else CHECKPOINT_SECONDS
    interval_passed = state.seconds // interval > length.previous_seconds // interval
    return interval_passed or (not length.seconds and plan.ends_epoch(state.step, args.CHECKPOINT_EVERY))


def samples_due(
    args: TrainingArguments, epoch: int, validate_every: int, length: RunLength, state: "RunState", history: list[dict]
) -> bool:
    """Return whether this validation also writes samples.

    It does so every --sample-every epochs (default: 10). A run that ends by time has samples after each tenth of its
    time by default.
    """
    if args.sample_every or not length.seconds:
        return epoch % (args.sample_every or 10) < validate_every
    previous_seconds = history[-1]["seconds"] if history else 0.0
    return 10 * state.seconds // length.seconds > 10 * previous_seconds // length.seconds


def epochs_between_validations(args: TrainingArguments, plan: BatchPlan, forward_passes: int) -> int:
    """Return the number of epochs between two validations: --validate-every, if it is set.

    Otherwise it is the smallest number for which validation takes 3 % of the time or less. The cost of a training step
    is counted as three forward passes per photo. A run with a length in epochs or steps has at least ten validations,
    even if they take more time.

    Args:
        forward_passes: number of photos that each rank runs through the model in one validation.
    """
    every = math.ceil(forward_passes * plan.num_processes / (0.03 * 3 * plan.steps_per_epoch * plan.global_batch))
    epochs = math.ceil(args.max_train_steps / plan.steps_per_epoch) if args.max_train_steps else args.epochs
    return args.validate_every or (every if args.max_train_minutes else min(every, max(1, epochs // 10)))


# --- gradients --------------------------------------------------------------------------------------------------------


def clip_gradients(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], limit: float
) -> None:
    """Scale the gradients down to the norm `limit` if their norm is larger.

    On a CPU the gradients are not scaled if their norm is within the limit. Reading the norm costs nothing there, and
    scaling by 1 would be one more pass over the gradients.
    """
    if is_sharded(accelerator):
        accelerator.clip_grad_norm_(parameters, limit)  # it adds up the norm over the ranks
        return
    # only this optimizer: the gradients of another one may still be accumulating
    accelerator.unscale_gradients(optimizer)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # two thirds of the gradients are small vectors: concatenated, they need only one norm
    vectors = [gradient for gradient in gradients if gradient.ndim == 1]
    matrices = [gradient for gradient in gradients if gradient.ndim != 1]
    norm = torch.nn.utils.get_total_norm([torch.cat(vectors), *matrices] if vectors else matrices)
    if accelerator.device.type != "cpu":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif norm > limit:
        torch._foreach_mul_(gradients, float(limit / (norm + 1e-6)))  # as torch does, but not grouped by device


# --- EMA --------------------------------------------------------------------------------------------------------------


class EMA(EMAModel):
    """The EMA of diffusers with a faster step: one pass over the weights instead of two passes and a copy."""

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - self.cur_decay_value)


def build_ema(args: TrainingArguments, model: torch.nn.Module) -> EMA | None:
    """Return an EMA whose decay warms up as 1 - (1 + step)^(-2/3) to at most --ema-decay. None for --no-ema."""
    if not args.ema:
        return None
    return EMA(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3, foreach=True)


@contextmanager
def ema_weights(
    ema: EMAModel | None, model: torch.nn.Module, unsharded: torch.nn.Module | None = None
) -> Iterator[None]:
    """Give the model the EMA weights and switch it to evaluation mode, within the context.

    Args:
        ema: None for --no-ema. The model then keeps its own weights.
        unsharded: the unsharded copy of a sharded model. The weights are copied to it, and the model does not change.
    """
    if unsharded:
        with torch.no_grad():
            for target, source in zip(
                unsharded.parameters(), ema.shadow_params if ema else model.parameters(), strict=True
            ):
                target.copy_(full_tensor(source))
        unsharded.eval()
        yield
        return
    model.eval()
    if ema:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield
    finally:
        if ema:
            ema.restore(model.parameters())
        model.train()


# --- compilation ------------------------------------------------------------------------------------------------------


class Compilation:
    """--compile: compile the model during the run, and print how much time that saves.

    The first steps run uncompiled, so that there is a speed to compare with. A resumed run is compiled after its first
    step, if it was compiled when it stopped. The keys of the checkpoints do not change.

    The gradients of the compiled model are checked. With torch 2.13 on a CPU, the compiler loses the gradients of most
    layers of a VAE in bf16.
    """

    PLAIN, WARMUP, COMPILED = 10, 10, 20  # steps of each phase; the three steps before them are not timed
    MIN_COSINE = 0.9  # of uncompiled and compiled gradients; the rounding of bf16 alone gives 0.99

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, model: torch.nn.Module, first_step: int
    ) -> None:
        self.accelerator, self.model = accelerator, accelerator.unwrap_model(model)
        # the end time of each step; None: the steps are not timed
        self.times: list[float] | None = [] if args.compile and not first_step else None
        self.inputs: tuple[torch.Tensor, ...] = ()  # of the last step
        self.input_hook = self.model.register_forward_pre_hook(self.keep) if args.compile else None

    def keep(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = inputs

    def tick(self, step: int, steps_to_come: int) -> None:
        """Call this after each step. It compiles the model when it is time, and later prints the report."""
        if self.times is not None:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.monotonic())
        if self.input_hook and step >= 3 + self.PLAIN:
            self.input_hook.remove()
            self.input_hook = None
            if not self.compile():
                self.times = None
        if self.times is not None and len(self.times) == 3 + self.PLAIN + self.WARMUP + self.COMPILED:
            seconds = np.diff(self.times)
            plain, compiled = np.median(seconds[2 : 2 + self.PLAIN]), np.median(seconds[-self.COMPILED :])
            warmup = seconds[2 + self.PLAIN : -self.COMPILED].sum() - self.WARMUP * compiled
            self.accelerator.print(compilation_report(plain, compiled, warmup, steps_to_come))
            self.times = None

    def compile(self) -> bool:
        """Compile the model, and return True. If the compiled gradients are wrong, undo it and return False.

        The gradients are not checked for a model with dropout, nor for a sharded model.
        """
        # with dropout, no two forward passes are equal
        has_dropout = any(isinstance(part, torch.nn.Dropout) and part.p for part in self.model.modules())
        if has_dropout or is_sharded(self.accelerator):
            self.model.compile()
            return True
        plain_gradient = self.gradient()
        self.model.compile()
        cosine = float(torch.nn.functional.cosine_similarity(plain_gradient, self.gradient(), dim=0))
        cosine, self.inputs = broadcast_from_main(self.accelerator, cosine), ()
        if cosine > self.MIN_COSINE or not plain_gradient.isfinite().all():
            return True
        self.model._compiled_call_impl = None  # the attribute that Module.compile sets
        reason = f"a compiler bug changes the gradients of the model (cosine similarity {cosine:.2f})"
        self.accelerator.print(f"--compile: {reason}: the run continues uncompiled")
        return False

    def gradient(self) -> torch.Tensor:
        """Return the gradient of a fixed weighted sum of the model's outputs for the inputs of the last step.

        The gradient is with respect to all weights: (number of weights,).
        """
        with self.accelerator.autocast():  # as in the loops, because the compiler takes autocast into account
            outputs = [values for values in self.model(*self.inputs) if values.requires_grad]
        fixed = torch.Generator().manual_seed(0)
        # divided, because fp16 overflows at a few 10,000
        weights = [torch.randn(values.shape, generator=fixed) / values.numel() ** 0.5 for values in outputs]
        total = sum((values * weight.to(values.device)).sum() for values, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(total, list(self.model.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([values.float().flatten() for values in gradients])


def require_compiler(device_type: str) -> None:
    """Check that torch.compile works on this machine. Otherwise it would only fail in the middle of the run.

    Raises:
        UserError: it does not work, for example because there is no C++ compiler.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device_type))
    except Exception as error:  # torch.compile raises many types of exceptions
        missing = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        raise UserError(
            f"--compile: torch.compile does not work here ({first_line(error)}): install {missing}, or omit --compile"
        ) from None


def compilation_report(plain: float, compiled: float, warmup: float, steps_to_come: int) -> str:
    """Return the line that tells the user whether compiling saves time in this run.

    Args:
        plain, compiled: seconds per step without and with compilation.
        warmup: seconds that compiling took.
        steps_to_come: number of steps until the end of the run.
    """
    line = (
        f"--compile: {1e3 * compiled:.3g} ms per step instead of {1e3 * plain:.3g}, after {warmup:.0f} s of compiling"
    )
    break_even_steps = warmup / (plain - compiled) if compiled < plain else math.inf
    if break_even_steps > steps_to_come:
        return f"{line}: compiling costs this run more time than it saves: omit --compile"
    return f"{line}: it saves time after {break_even_steps:,.0f} of {steps_to_come:,} steps"


# --- metrics ----------------------------------------------------------------------------------------------------------


class RunningMean:
    """The mean of each named value over the forward passes of an epoch that had this value.

    The sums stay on the device, so the CPU does not wait for it until the means are read.
    """

    def __init__(self, state: RunState, device: torch.device) -> None:
        self.sums = {name: (torch.tensor(total, device=device), passes) for name, (total, passes) in state.sums.items()}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            total, passes = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value.detach().float(), passes + 1

    def store(self, state: RunState, accelerator: Accelerator) -> None:
        """Store the sums so far, averaged over the ranks, in the state. A checkpoint in mid-epoch needs them."""
        state.sums = {
            name: (float(accelerator.reduce(total, "mean")), passes) for name, (total, passes) in self.sums.items()
        }

    def means(self) -> dict[str, float]:
        """Return the means of this rank so far."""
        return {name: float(total) / passes for name, (total, passes) in self.sums.items()}

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all ranks, and start again from zero."""
        means = {name: float(accelerator.reduce(total / passes, "mean")) for name, (total, passes) in self.sums.items()}
        self.sums = {}
        return means


def append_metrics(path: Path, record: dict) -> None:
    """Append one line to metrics.jsonl. It is written in one call, so a reader sees a complete line or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def open_history(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: RunState,
    script: str,
    photos: DatasetDict,
    seen_before: Sequence[str] = (),
    **more: object,
) -> list[dict]:
    """Write run.json, training_photos.txt and metrics.jsonl, start the trackers, and return the metrics so far.

    A resumed run keeps the metrics up to the step of the state. The later lines are removed, because the run will write
    them again.

    A removed line may belong to a model that was saved as best. If the run resumes from an older checkpoint than the
    latest, or ends by time, it may not reach this model again. No line would then describe the model in the run folder.
    In this case, the next validation saves its model as best.

    Args:
        seen_before: names of photos that a part of the model was already trained on. They are added to the training
            photos of this run.
        more: more entries for run.json.
    """
    path = args.run_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        finish_model_save(args.run_dir)
    all_records = broadcast_from_main(accelerator, read_metrics(path))
    history = [record for record in all_records if record["step"] <= state.step]
    # the resumed run will repeat each removed step exactly
    repeats_exactly = args.resume == "latest" and not args.max_train_minutes
    if args.resume and not repeats_exactly and any(record.get("published") for record in all_records[len(history) :]):
        state.best = math.inf
    if accelerator.is_main_process:
        write_text(path, "".join(json.dumps(record) + "\n" for record in history))
        names = dict.fromkeys([*photos["train"]["file_name"][:], *seen_before])
        write_text(args.run_dir / TRAINING_PHOTOS, "".join(f"{name}\n" for name in names))
        data = {
            "source": str(args.photo_source) if isinstance(args.photo_source, str) else args.photo_source.name,
            "classes": photos["train"].features["label"].names,
            "photos": {split: len(part) for split, part in photos.items()},
        }
        write_json(
            args.run_dir / "run.json",
            {
                "finished": False,
                "command": args.command(script),
                "plan": args.planned | args.timed,
                "device": device_name(accelerator),
                "data": data,
            }
            | more,
        )
    accelerator.init_trackers(script.removesuffix(".py"))
    return history


def training_photos(model: Path | str) -> list[str]:
    """Return the names of the photos that the model was trained on.

    The list is empty if they are unknown, for example if `model` is a Hub id.
    """
    listed = Path(model) / TRAINING_PHOTOS
    return listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []


def count_trained_on(model: Path | str, names: Sequence[str]) -> int:
    """Return how many of the named photos the model was trained on.

    After a new split of the photos, some held-out photos can be former training photos.

    `prepare` makes the folder a part of the file name and may change the extension. The same photo is recognised before
    and after `prepare`. It is not recognised if its name was too long for a file: `prepare` replaces such a name with a
    hash.
    """

    def stems(files: Sequence[str]) -> set[str]:
        return {str(Path(name.replace("/", "_")).with_suffix("")) for name in files}

    return len(stems(names) & stems(training_photos(model)))


# --- stopping ---------------------------------------------------------------------------------------------------------


def early_stop_reason(state: RunState, patience: int | None, window: int, threshold: float) -> str:
    """Return the reason to stop the run now, or "".

    The first reason is that `patience` validations have passed without a lower loss. The second reason is that the loss
    oscillates without falling: within the last `window` validations it changed direction at least window / 2 times, and
    the minimum of their second half is at most `threshold` below the minimum of their first half.

    `update_early_stopping` records the losses in the state.
    """
    if patience and state.validations_waited >= patience:
        return f"no lower loss in {patience} validations; give --early-stopping-patience 0 to continue"
    if window and len(state.recent) == window:
        changes = np.sign(np.diff(state.recent))
        turns = int((changes[1:] * changes[:-1] < 0).sum())
        fall = min(state.recent[: window // 2]) - min(state.recent[window // 2 :])
        if turns >= window / 2 and fall <= threshold:
            return (
                "the validation loss oscillates without falling "
                f"({turns} turns in {window} validations, fell by {fall:.2g})"
            )
    return ""


class StopSignal:
    """Lets the run save a checkpoint and end cleanly after the first SIGINT or SIGTERM.

    A second signal ends the run at once.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def received(self, accelerator: Accelerator, state: RunState) -> bool:
        """Return whether any rank has received a signal. The answer is the same on all ranks.

        Several ranks exchange the signal every SYNC_EVERY steps. At the other steps the answer is False. After the
        exchange, every rank has the number of the signal.
        """
        if accelerator.num_processes > 1:
            if state.step % SYNC_EVERY:
                return False
            self.number = int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())
        return bool(self.number)

    def exit(self, state: RunState) -> None:
        """If a signal was received, print how to continue and exit with the exit code of the signal."""
        if self.number:
            print(
                f"stopped at step {state.step}, a checkpoint is saved: give --resume latest to continue",
                file=sys.stderr,
            )
            sys.exit(128 + self.number)


@contextmanager
def explain_out_of_memory(args: TrainingArguments) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError: one line with the settings of the run and the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peak_memory = (
            f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in use at the peak"
            if torch.cuda.is_available()
            else ""
        )
        size = f"{'x'.join(map(str, args.size_px))} px" if args.size_px else "the VAE's size"
        hint = "a smaller --image-size or --config"
        if not args.batch_size:  # the batch size has not been planned yet
            raise UserError(
                f"out of memory before training began{peak_memory}: end other programs that use memory, or give {hint}"
            ) from None
        if not args.gradient_checkpointing:
            hint = f"--gradient-checkpointing, or {hint}"
        divisors = [d for d in range(1, args.batch_size // 2 + 1) if args.batch_size % d == 0]
        if divisors:
            accumulated = args.grad_accum * args.batch_size // divisors[-1]
            hint = f"--batch-size {divisors[-1]} --grad-accum {accumulated} (the same effective batch), or {hint}"
        raise UserError(
            f"out of memory with --batch-size {args.batch_size} at {size}{peak_memory}: try {hint}"
        ) from None


def progress_bar(plan: BatchPlan, state: RunState, length: RunLength, accelerator: Accelerator) -> tqdm:
    """Return a progress bar with photos per second and the time left. It adds a line every 30 seconds to a log file."""
    return tqdm(
        total=length.steps and length.steps * plan.global_batch,
        initial=state.step * plan.global_batch,
        unit=" photos",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )


def show_progress(
    bar: tqdm, plan: BatchPlan, state: RunState, length: RunLength, means: RunningMean, args: TrainingArguments
) -> None:
    """Move the bar by one step. The first three steps and every tenth step also update the losses of the epoch so far.

    Raises:
        UserError: one of these losses is NaN or infinite.
    """
    if state.step % 10 == 0 or state.step <= 3:
        bar.total = length.total_steps(state) * plan.global_batch
        losses = means.means()
        bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()}, refresh=False)
        if not all(map(math.isfinite, losses.values())):
            hint = f"try --lr {args.learning_rate / 3:.1g} (was {args.learning_rate:g}) with another --output-dir"
            raise UserError(f"the loss is NaN or infinite at step {state.step}: {hint}")
    bar.update(plan.global_batch)


def log_validation(
    accelerator: Accelerator,
    args: TrainingArguments,
    plan: BatchPlan,
    state: RunState,
    history: list[dict],
    bar: tqdm,
    values: dict[str, float],
    is_printed: bool,
    not_printed: Sequence[str] = (),
) -> None:
    """Add the values of a validation to the history, to metrics.jsonl and to the trackers. Print them if `is_printed`.

    Args:
        not_printed: names of values that are left out of the printed line. Their measurement differs from that of the
            values beside them, so a comparison would mislead.
    """
    epoch = plan.epoch(state.step)
    progress = {
        "step": state.step,
        "epoch": epoch,
        "images_seen": state.step * plan.global_batch,
        "seconds": round(state.seconds, 3),
    }
    history.append(progress | {name: float(f"{value:.6g}") for name, value in values.items()})
    accelerator.log(values, step=state.step)
    if accelerator.is_main_process:
        append_metrics(args.run_dir / "metrics.jsonl", history[-1])
        if is_printed:
            # names with a number at the end are bands of timesteps, which only the plot shows
            printed = {
                name: value
                for name, value in values.items()
                if not re.search(r"_\d$", name) and name not in not_printed
            }
            bar.write(
                f"epoch {epoch}: "
                + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in printed.items())
            )


def update_early_stopping(state: RunState, loss: float, delta: float = 0.0, window: int = 0) -> None:
    """Record the loss of a validation for `early_stop_reason`. It counts as lower only if it is lower by `delta`."""
    state.recent = [*state.recent, loss][-window:] if window else []
    state.validations_waited += 1
    if loss < state.to_beat - delta:
        state.to_beat, state.validations_waited = loss, 0


def update_best_loss(state: RunState, loss: float) -> bool:
    """Record a held-out loss in the state, and return whether it is the lowest so far."""
    is_lowest = loss < state.best
    state.best = min(loss, state.best)
    return is_lowest
