"""What both training loops need around the science: device, length, EMA, compiling, metrics, stopping.

Free functions and small classes; the loops themselves are in train_vae.py and train_unet.py, in plain sight.
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
from corel_diffusers.data.cache import ALONE, Share
from corel_diffusers.files import (
    MARKERS,
    UserError,
    finish_publishing,
    first_line,
    is_out_of_memory,
    read_metrics,
    require_writable,
    write_json,
    write_text,
)
from corel_diffusers.precision import resolve_precision
from corel_diffusers.processes import of_main_process
from corel_diffusers.sharding import is_sharded, whole

TRAINING_PHOTOS = "training_photos.txt"  # in a run's folder: the files that it trains on
SLOW_START = 0.2  # of a run's minutes: so much for preparing the photos is worth a word
CHECKPOINT_SECONDS = 600  # what a crash may cost
SYNC_EVERY = 10  # steps; so often the ranks of a run tell each other the time and whether they were told to stop


# --- the run: device, precision, folder --------------------------------------------------------------------------------


def start_run(args: TrainingArguments) -> Accelerator:
    """Device, precision, processes and trackers by accelerate. Raises UserError before anything is built or written."""
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = resolve_precision(args.mixed_precision, "cuda" if gpu else "cpu")
    timed = precision == "bf16" and not gpu  # what is fastest then depends on the machine and the model: planning.settle
    if not timed or os.environ.get("ACCELERATE_MIXED_PRECISION") == precision:
        args.mixed_precision = precision
    if not timed and args.attention == "auto":
        args.attention = "fused"
    if not args.plan and os.environ.get("RANK", "0") == "0":  # who writes
        require_writable(args.run_dir, "--output-dir")
    begun = read_metrics(args.run_dir / "metrics.jsonl") or find_checkpoints(args.run_dir)
    if begun and not args.resume and not args.plan:
        way_out = "give --resume latest to go on with it, or another --output-dir"
        raise UserError(f"--output-dir {args.run_dir} already holds a run: {way_out}")
    other = next((name for name in MARKERS if (args.run_dir / name).exists()), None)
    if other and not (args.run_dir / "run.json").is_file() and not args.plan:  # a download, say: it would be written over
        raise UserError(f"--output-dir {args.run_dir} holds a {other} that no run has written there: give another folder")
    if args.compile:
        require_compiler("cuda" if gpu else "cpu")
    refuse_other_launchers()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=precision,
        # as a plugin: a plain number gives way to what `accelerate launch` leaves in the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.grad_accum),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # ranks wait while photos are encoded, or pictures drawn
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(args.run_dir), logging_dir=str(args.run_dir / "logs")),
    )
    if len(found := set(gather_object([precision]))) > 1:
        raise UserError(f"--mixed-precision {args.mixed_precision} is {' and '.join(sorted(found))} on the machines of this run: give no")
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launched not in ("1", "auto", str(args.grad_accum)):
        accelerator.print(
            f"notice: accelerate launch asks for {launched} accumulated passes; --grad-accum {args.grad_accum} is what counts"
        )
    accelerator.print(f"running on {device_name(accelerator)}" + ("" if timed else f", mixed precision {precision}"))
    return accelerator


def refuse_other_launchers() -> None:
    """Raises UserError where `accelerate launch` asks for a way of distributing the model that the scripts do not support."""
    for name, kind in {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(f"accelerate launch: {kind} is not supported: launch with --multi_gpu (DDP) or --use_fsdp --fsdp_version 2")


def device_name(accelerator: Accelerator) -> str:
    """What the run computes on, for people: "2 x NVIDIA L4", "CPU (8 threads)"."""
    gpu = accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{accelerator.device.type.upper()} ({torch.get_num_threads()} threads)"
    return f"{accelerator.num_processes} x {name}" if accelerator.num_processes > 1 else name


def cache_share(accelerator: Accelerator) -> Share:
    """This process's share of filling the caches: those of one machine divide the photos, each machine has a cache of its own."""
    if accelerator.num_processes == 1:
        return ALONE
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return Share(accelerator.local_process_index, processes, accelerator.wait_for_everyone)


def print_data_and_model(accelerator: Accelerator, photos: DatasetDict, size_px: tuple[int, int], model: str) -> None:
    """Says what is trained on what, before the first step."""
    classes = photos["train"].features["label"].names
    counts = f"{len(photos['train'])} photos to train on, {len(photos['validation'])} held out, {len(classes)} classes"
    accelerator.print(f"{counts}, {size_px[0]}x{size_px[1]} px; {model}")


# --- how long, and how often to look --------------------------------------------------------------------------------------


@dataclass
class RunLength:
    """Where a run ends: after so many steps, or so many seconds after it began (resumed time included)."""

    steps: int | None
    seconds: float | None
    began: float  # time.monotonic() of the beginning
    before: float = math.inf  # the state's seconds before the last tick

    @classmethod
    def of(cls, args: TrainingArguments, plan: BatchPlan, accelerator: Accelerator, state: "RunState", began: float) -> "RunLength":
        """began: time.monotonic() of this process's beginning. Raises UserError where its minutes are over before its first step."""
        if not args.max_train_minutes:
            return cls(args.max_train_steps or args.epochs * plan.steps_per_epoch, None, began - state.seconds)
        seconds, spent = 60 * args.max_train_minutes, of_main_process(accelerator, time.monotonic() - began)
        told = f"decoding and encoding the photos took {spent / 60:.1f} of the {args.max_train_minutes:g} minutes"
        if not state.step and spent >= seconds:
            raise UserError(f"--max-train-minutes {args.max_train_minutes:g}: {told}; it is done and kept: start the same command again")
        if not state.step and spent > SLOW_START * seconds:
            accelerator.print(f"notice: {told}; it is done and kept: the same command started again has them for training")
        return cls(None, seconds, began - state.seconds)

    def tick(self, state: "RunState", accelerator: Accelerator) -> None:
        """Books the time; every rank gets the first one's, now and then, as it decides on checkpoints and on the end."""
        self.before = state.seconds
        if accelerator.num_processes == 1:
            state.seconds = time.monotonic() - self.began
        elif state.step % SYNC_EVERY == 0:
            state.seconds = of_main_process(accelerator, time.monotonic() - self.began)

    def total_steps(self, state: "RunState") -> int:
        """The steps of the whole run; of one that ends by time, as many as its pace so far leads to."""
        return self.steps or max(state.step + 1, round(state.step * self.seconds / max(state.seconds, 1e-9)))

    def share(self, state: "RunState") -> float:
        """How much of the run is done, from 0 to 1."""
        return state.step / self.steps if self.steps else state.seconds / self.seconds

    def reached(self, state: "RunState") -> bool:
        return self.share(state) >= 1


def checkpoint_due(args: TrainingArguments, plan: BatchPlan, state: "RunState", length: RunLength) -> bool:
    """Whether this step ends as many epochs as --checkpoint-every says. Left open: every ten minutes, and a tenth of a run of minutes, or
    CHECKPOINT_EVERY epochs."""
    if args.checkpoint_every:
        return plan.ends_epoch(state.step, args.checkpoint_every)
    interval = min(length.seconds / 10, CHECKPOINT_SECONDS) if length.seconds else CHECKPOINT_SECONDS
    passed = state.seconds // interval > length.before // interval
    return passed or (not length.seconds and plan.ends_epoch(state.step, args.CHECKPOINT_EVERY))


def pictures_due(
    args: TrainingArguments, epoch: int, validate_every: int, length: RunLength, state: "RunState", history: list[dict]
) -> bool:
    """Whether this validation comes with pictures: --sample-every epochs have passed, or a tenth of a run of minutes, since the last."""
    if args.sample_every or not length.seconds:
        return epoch % (args.sample_every or 10) < validate_every
    before = history[-1]["seconds"] if history else 0.0
    return 10 * state.seconds // length.seconds > 10 * before // length.seconds


def epochs_between_validations(args: TrainingArguments, plan: BatchPlan, forward_passes: int) -> int:
    """--validate-every, or as few epochs as keep validation, so many photos' forward passes on each rank, at 3 % of the time or less.

    A training step costs three forward passes a photo. At least ten validations fall into a run that counts epochs.
    """
    every = math.ceil(forward_passes * plan.num_processes / (0.03 * 3 * plan.steps_per_epoch * plan.global_batch))
    epochs = math.ceil(args.max_train_steps / plan.steps_per_epoch) if args.max_train_steps else args.epochs
    return args.validate_every or (every if args.max_train_minutes else min(every, max(1, epochs // 10)))


# --- gradients ----------------------------------------------------------------------------------------------------------


def clip_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], limit: float) -> None:
    """Scales the gradients down to that norm where theirs is above. On a CPU, gradients within it are left alone: there the answer is at
    hand, and scaling by 1 is one more pass over them."""
    if is_sharded(accelerator):
        accelerator.clip_grad_norm_(parameters, limit)  # sums the norm up over the ranks
        return
    accelerator.unscale_gradients(optimizer)  # no other's, whose gradients may be half summed up
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    vectors = [gradient for gradient in gradients if gradient.ndim == 1]  # two thirds of them: small, and all in one are one norm
    matrices = [gradient for gradient in gradients if gradient.ndim != 1]
    norm = torch.nn.utils.get_total_norm([torch.cat(vectors), *matrices] if vectors else matrices)
    if accelerator.device.type != "cpu":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif norm > limit:
        torch._foreach_mul_(gradients, float(limit / (norm + 1e-6)))  # as torch does, without sorting them by device


# --- EMA ----------------------------------------------------------------------------------------------------------------


class EMA(EMAModel):
    """diffusers' average, in one pass over the weights a step where its own takes two and a copy of them."""

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - self.cur_decay_value)


def build_ema(args: TrainingArguments, model: torch.nn.Module) -> EMA | None:
    """The average with the warm-up 1 - (1 + step)^(-2/3), or None for --no-ema."""
    if not args.ema:
        return None
    return EMA(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3, foreach=True)


@contextmanager
def ema_weights(ema: EMAModel | None, model: torch.nn.Module, beside: torch.nn.Module | None = None) -> Iterator[None]:
    """Within, the model has the EMA's weights and is in evaluation mode. beside: the whole copy that has them, of a model in parts."""
    if beside:
        with torch.no_grad():
            for target, source in zip(beside.parameters(), ema.shadow_params if ema else model.parameters(), strict=True):
                target.copy_(whole(source))
        beside.eval()
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


# --- compiling ----------------------------------------------------------------------------------------------------------


class Compilation:
    """--compile: a run's first steps go uncompiled, so that there is something to compare with; then it says what was gained.

    A resumed run is compiled after its first step where it was when it stopped. The keys of checkpoints stay what they are. What was
    compiled has to have the model's gradients: of a VAE in bf16, torch 2.13's compiler loses those of most layers on a CPU.
    """

    PLAIN, WARMUP, COMPILED = 10, 10, 20  # steps; the first three are not counted
    ALIKE = 0.9  # cosine of the gradients, plain and compiled: bf16 by itself leaves 0.99

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, model: torch.nn.Module, state: RunState) -> None:
        self.accelerator, self.model = accelerator, accelerator.unwrap_model(model)
        self.times: list[float] | None = [] if args.compile and not state.step else None  # when each step ended, until it is told
        self.inputs: tuple[torch.Tensor, ...] = ()  # of the last step
        self.waiting = self.model.register_forward_pre_hook(self.keep) if args.compile else None

    def keep(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = inputs

    def tick(self, step: int, steps_to_come: int) -> None:
        """After each step."""
        if self.times is not None:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.monotonic())
        if self.waiting and step >= 3 + self.PLAIN:
            self.waiting.remove()
            self.waiting = None
            if not self.compile():
                self.times = None
        if self.times is not None and len(self.times) == 3 + self.PLAIN + self.WARMUP + self.COMPILED:
            seconds = np.diff(self.times)
            plain, compiled = np.median(seconds[2 : 2 + self.PLAIN]), np.median(seconds[-self.COMPILED :])
            warmup = seconds[2 + self.PLAIN : -self.COMPILED].sum() - self.WARMUP * compiled
            self.accelerator.print(compilation_report(plain, compiled, warmup, steps_to_come))
            self.times = None

    def compile(self) -> bool:
        """Compiles the model, and whether that holds: not where its gradients are not the model's any more."""
        dropout = any(isinstance(part, torch.nn.Dropout) and part.p for part in self.model.modules())  # no two passes are alike
        if dropout or is_sharded(self.accelerator):
            self.model.compile()
            return True
        plain = self.gradient()
        self.model.compile()
        alike = float(torch.nn.functional.cosine_similarity(plain, self.gradient(), dim=0))
        alike, self.inputs = of_main_process(self.accelerator, alike), ()
        if alike > self.ALIKE or not plain.isfinite().all():
            return True
        self.model._compiled_call_impl = None  # what Module.compile sets
        told = f"the compiled model's gradients are not the model's (a cosine of {alike:.2f}), which is the compiler's fault"
        self.accelerator.print(f"--compile: {told}: the run goes on uncompiled")
        return False

    def gradient(self) -> torch.Tensor:
        """All weights' gradients of a fixed sum of what the model makes of the last step's inputs, (parameters,)."""
        with self.accelerator.autocast():  # as the loops do: the compiler looks at that too
            made = [values for values in self.model(*self.inputs) if values.requires_grad]
        fixed = torch.Generator().manual_seed(0)
        weights = [torch.randn(values.shape, generator=fixed) / values.numel() ** 0.5 for values in made]  # fp16 overflows at a few 10,000
        total = sum((values * weight.to(values.device)).sum() for values, weight in zip(made, weights, strict=True))
        found = torch.autograd.grad(total, list(self.model.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([values.float().flatten() for values in found])


def require_compiler(device_type: str) -> None:
    """Raises UserError where torch.compile has nothing to compile with, which it would only say in the midst of the run."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device_type))
    except Exception as error:  # torch's compiler raises many kinds
        needed = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        raise UserError(f"--compile: nothing can be compiled here ({first_line(error)}): install {needed}, or leave it out") from None


def compilation_report(plain: float, compiled: float, warmup: float, steps_to_come: int) -> str:
    """What compiling came to: seconds a step without and with it, and those that it took."""
    line = f"--compile: {1e3 * compiled:.3g} ms a step in place of {1e3 * plain:.3g}, after {warmup:.0f} s of compiling"
    back = warmup / (plain - compiled) if compiled < plain else math.inf
    if back > steps_to_come:
        return f"{line}: this run will not win that back, leave the flag out"
    return f"{line}: won back after {back:,.0f} of {steps_to_come:,} steps"


# --- metrics ------------------------------------------------------------------------------------------------------------


class RunningMean:
    """Means of named values over an epoch's forward passes that had them, summed on the device: nothing waits for it until it is read."""

    def __init__(self, state: RunState, device: torch.device) -> None:
        self.sums = {name: (torch.tensor(total, device=device), passes) for name, (total, passes) in state.sums.items()}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            total, passes = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value.detach().float(), passes + 1

    def store(self, state: RunState, accelerator: Accelerator) -> None:
        """Puts the sums so far, averaged over ranks, into the state, for a checkpoint in mid-epoch."""
        state.sums = {name: (float(accelerator.reduce(total, "mean")), passes) for name, (total, passes) in self.sums.items()}

    def means(self) -> dict[str, float]:
        """This rank's means so far."""
        return {name: float(total) / passes for name, (total, passes) in self.sums.items()}

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks; begins anew."""
        means = {name: float(accelerator.reduce(total / passes, "mean")) for name, (total, passes) in self.sums.items()}
        self.sums = {}
        return means


def append_metrics(path: Path, record: dict) -> None:
    """Adds one line; a line is written in one call, so that a reader sees it whole or not at all."""
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
    """Opens the run's folder: what the run is (run.json, with `more`), its photos, its metrics up to the state's step, its trackers.

    seen_before: files that a part of the model was trained on already; they count as this run's own.

    Lines after that step, which a resumed run writes again, are dropped. Returns those that stay. Where a line of a published model goes
    that may not come again, as from an older checkpoint than the latest or in a run of minutes, the next validation publishes: no log
    would tell of the folder's model.
    """
    path = args.run_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        finish_publishing(args.run_dir)
    known = of_main_process(accelerator, read_metrics(path))
    history = [record for record in known if record["step"] <= state.step]
    again = args.resume == "latest" and not args.max_train_minutes  # each step as it was
    if args.resume and not again and any(record.get("published") for record in known[len(history) :]):
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
    """The files that the model in a run's folder was trained on; none where nothing is known, as of a Hub id."""
    listed = Path(model) / TRAINING_PHOTOS
    return listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []


def trained_on(model: Path | str, names: Sequence[str]) -> int:
    """How many of these files the model was trained on: of photos that were split anew, some held-out ones were training photos before.

    A photo is the same before `prepare` and after, which turns folders into a part of the name and may change the ending (and a name
    too long for a file, which is not known again).
    """

    def stems(files: Sequence[str]) -> set[str]:
        return {str(Path(name.replace("/", "_")).with_suffix("")) for name in files}

    return len(stems(names) & stems(training_photos(model)))


# --- stopping -----------------------------------------------------------------------------------------------------------


def early_stop(state: RunState, patience: int | None, window: int, threshold: float) -> str:
    """Why the run should stop now, or "". Looks at `validations_waited` and at the last `window` losses that `watch` was given.

    The loss oscillates when it turned at least window / 2 times within the window and the lowest value of the window's second
    half is not below that of the first by more than `threshold`.
    """
    if patience and state.validations_waited >= patience:
        return f"no lower loss in {patience} validations; --early-stopping-patience 0 goes on"
    if window and len(state.recent) == window:
        changes = np.sign(np.diff(state.recent))
        turns = int((changes[1:] * changes[:-1] < 0).sum())
        fall = min(state.recent[: window // 2]) - min(state.recent[window // 2 :])
        if turns >= window / 2 and fall <= threshold:
            return f"the validation loss swings without falling ({turns} turns in {window} validations, fell by {fall:.2g})"
    return ""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a checkpoint and a clean end; the second one ends at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def received(self, accelerator: Accelerator, state: RunState) -> bool:
        """Whether any rank was told to stop; the same answer on each, at a step at which all ask. All then count as told."""
        if accelerator.num_processes > 1:
            if state.step % SYNC_EVERY:
                return False
            self.number = int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())
        return bool(self.number)

    def exit(self, state: RunState) -> None:
        """Where a signal came: says where to go on, and ends with the signal's exit code."""
        if self.number:
            print(f"stopped at step {state.step}, a checkpoint is written: --resume latest goes on from there", file=sys.stderr)
            sys.exit(128 + self.number)


@contextmanager
def explained_failures(args: TrainingArguments) -> Iterator[None]:
    """Turns running out of memory into one line with the flags that help and what the run had asked for."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        used = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in use at the peak" if torch.cuda.is_available() else ""
        size = f"{'x'.join(map(str, args.size_px))} px" if args.size_px else "the VAE's size"
        way_out = "a smaller --image-size or --config"
        if not args.batch_size:  # nothing was planned yet
            raise UserError(f"out of memory before training began{used}: something else holds the memory, or give {way_out}") from None
        if not args.gradient_checkpointing:
            way_out = f"--gradient-checkpointing, or {way_out}"
        divisors = [d for d in range(1, args.batch_size // 2 + 1) if args.batch_size % d == 0]
        if divisors:
            accumulated = args.grad_accum * args.batch_size // divisors[-1]
            way_out = f"--batch-size {divisors[-1]} --grad-accum {accumulated} (the same effective batch), or {way_out}"
        raise UserError(f"out of memory with --batch-size {args.batch_size} at {size}{used}: try {way_out}") from None


def progress_bar(plan: BatchPlan, state: RunState, length: RunLength, accelerator: Accelerator) -> tqdm:
    """Photos per second and time left; in a log file one line every half minute."""
    return tqdm(
        total=length.steps and length.steps * plan.global_batch,
        initial=state.step * plan.global_batch,
        unit=" photos",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )


def show_progress(bar: tqdm, plan: BatchPlan, state: RunState, length: RunLength, means: RunningMean, args: TrainingArguments) -> None:
    """Moves the bar by one step; every tenth shows the epoch's losses so far, and ends a run whose loss is no number any more."""
    if state.step % 10 == 0 or state.step <= 3:
        bar.total = length.total_steps(state) * plan.global_batch
        shown = means.means()
        bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        if not all(map(math.isfinite, shown.values())):
            way_out = f"try --lr {args.learning_rate / 3:.1g} (was {args.learning_rate:g}) with another --output-dir"
            raise UserError(f"the loss is no number any more at step {state.step}: {way_out}")
    bar.update(plan.global_batch)


def record_epoch(
    accelerator: Accelerator,
    args: TrainingArguments,
    plan: BatchPlan,
    state: RunState,
    history: list[dict],
    bar: tqdm,
    values: dict[str, float],
    shown: bool,
    apart: Sequence[str] = (),
) -> None:
    """One line of metrics.jsonl, in the history, the trackers and, where it is `shown`, on the screen: there without what is `apart`, as it
    is measured otherwise than what it would stand beside."""
    epoch = plan.epoch(state.step)
    place = {"step": state.step, "epoch": epoch, "images_seen": state.step * plan.global_batch, "seconds": round(state.seconds, 3)}
    history.append(place | {name: float(f"{value:.6g}") for name, value in values.items()})
    accelerator.log(values, step=state.step)
    if accelerator.is_main_process:
        append_metrics(args.run_dir / "metrics.jsonl", history[-1])
        if shown:
            told = {
                name: value for name, value in values.items() if not re.search(r"_\d$", name) and name not in apart
            }  # bands: for the plot
            bar.write(f"epoch {epoch}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in told.items()))


def watch(state: RunState, loss: float, delta: float = 0.0, window: int = 0) -> None:
    """Books a validation's loss for `early_stop`. Less than `delta` lower does not end the waiting."""
    state.recent = [*state.recent, loss][-window:] if window else []
    state.validations_waited += 1
    if loss < state.to_beat - delta:
        state.to_beat, state.validations_waited = loss, 0


def note_validation(state: RunState, loss: float) -> bool:
    """Books a held-out loss in the state; True where it is the lowest so far."""
    best = loss < state.best
    state.best = min(loss, state.best)
    return best
