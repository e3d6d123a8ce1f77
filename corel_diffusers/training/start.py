"""Start and end a training run: device, precision, processes and trackers. Explain an out-of-memory error."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

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

from corel_diffusers.config.checks import is_main_process
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.photos import load_numbered_photos
from corel_diffusers.files import (
    UserError,
    is_out_of_memory,
    one_line_errors,
    read_json,
    read_metrics,
    require_writable,
    write_json,
)
from corel_diffusers.internals import forget_models
from corel_diffusers.models.configs import parameter_count
from corel_diffusers.runtime.compilation import require_compiler
from corel_diffusers.runtime.devices import device_name
from corel_diffusers.runtime.precision import resolve_precision
from corel_diffusers.runtime.sharding import is_sharded, set_sharding
from corel_diffusers.saved_models import ENTRY_FILES
from corel_diffusers.training.checkpoints import find_checkpoints
from corel_diffusers.training.run import Run
from corel_diffusers.training.run_lock import locked

MODEL_NAMES = {"vae": "VAE", "unet": "UNet"}


def start_run(flags: TrainingArguments) -> Accelerator:
    """Check the flags and return the Accelerator: device, precision, processes and trackers.

    Raises:
        UserError: the run cannot start. Nothing has been built or written then.
    """
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = resolve_precision(flags.mixed_precision, "cuda" if gpu else "cpu")
    if not flags.plan and is_main_process():  # only the main process writes
        require_writable(flags.run_dir, "--output-dir")
    begun = read_metrics(flags.run_dir / "metrics.jsonl") or find_checkpoints(flags.run_dir)
    if begun and not flags.resume and not flags.plan:
        hint = "give --resume latest to continue it, or another --output-dir"
        raise UserError(f"--output-dir {flags.run_dir} already holds a run: {hint}")
    entry_file = next((name for name in ENTRY_FILES if (flags.run_dir / name).exists()), None)
    # for example a downloaded model, which the run would overwrite
    if entry_file and not (flags.run_dir / "run.json").is_file() and not flags.plan:
        raise UserError(
            f"--output-dir {flags.run_dir} holds a {entry_file} that was not written by a run: give another folder"
        )
    if flags.compile:
        require_compiler("cuda" if gpu else "cpu")
    refuse_other_launchers()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=precision,
        # a plugin, because the environment of `accelerate launch` overrides a plain number
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=flags.grad_accum),
        # the other ranks wait while photos are encoded or samples are generated
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        log_with=flags.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(flags.run_dir), logging_dir=str(flags.run_dir / "logs")),
    )
    if flags.auto_batch_size and accelerator.num_processes > 1:  # the others would wait for the one that failed
        raise UserError("--auto-batch-size works in one process only: give --batch-size and --grad-accum instead")
    if len(precisions := set(gather_object([precision]))) > 1:
        raise UserError(
            f"--mixed-precision {precision}: the machines of this run support different precisions "
            f"({' and '.join(sorted(precisions))}): give --mixed-precision no"
        )
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`
    if is_launched and accelerator.device.type == "cpu" and torch.get_num_threads() == 1 < (os.cpu_count() or 1):
        accelerator.print(
            "notice: this process has one thread (accelerate launch gives it one if OMP_NUM_THREADS is not set): "
            f"set OMP_NUM_THREADS={os.cpu_count()} to use all cores, if no other program needs them"
        )
    launcher_steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launcher_steps not in ("1", "auto", str(flags.grad_accum)):
        accelerator.print(
            f"notice: accelerate launch asks for {launcher_steps} gradient accumulation steps, "
            f"but the run uses --grad-accum {flags.grad_accum}"
        )
    # on a CPU with bf16, plan_run may choose another precision by timing steps
    is_known = gpu or precision != "bf16"
    if is_sharded(accelerator):
        if flags.MODEL == "vae":
            hint = "launch train_vae.py without it"
            raise UserError(f"--use_fsdp is for a UNet that is too large to train on one GPU: {hint}")
        set_sharding(accelerator, flags.optimizer)
    accelerator.print(f"running on {device_name(accelerator)}" + (f", mixed precision {precision}" if is_known else ""))
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


def load_training_photos(flags: TrainingArguments, accelerator: Accelerator) -> tuple[DatasetDict, dict[str, int]]:
    """Return the photos of the splits train and validation, and the numbers of their classes by name.

    Training never sees the test split, which `evaluate` reports on.
    """
    with accelerator.local_main_process_first():
        photos, class_numbers = load_numbered_photos(
            flags.photo_source, classes=flags.classes, max_train_samples=flags.max_train_samples
        )
    photos.pop("test", None)
    return photos, class_numbers


def print_data_and_model(
    run: Run,
    photos: DatasetDict,
    model: torch.nn.Module,
    sizes_px: list[tuple[int, int]],
    latent_shape: tuple[int, ...],
) -> None:
    """Print the data and the model before the first step.

    Args:
        sizes_px: the (height, width) of the photos, the most frequent one first.
        latent_shape: the (C, h, w) of the first of these sizes.
    """
    train, held_out = photos["train"], photos["validation"]
    classes = train.features["label"].names
    name = MODEL_NAMES[run.args.MODEL]
    if run.args.MODEL == "unet" and not model.config.num_class_embeds:
        name += " without classes"
    sizes = " or ".join(f"{height}x{width}" for height, width in sizes_px)
    counted = f"{len(classes)} classes" if len(classes) > 1 else "no classes"
    run.accelerator.print(
        f"{len(train)} training photos, {len(held_out)} held-out photos, {counted}, "
        f"{sizes} px; {name} of {parameter_count(model)}, "
        f"latents {'x'.join(map(str, latent_shape))}"
    )


def print_notices(accelerator: Accelerator, lines: list[str]) -> None:
    """Print one notice per line."""
    for line in lines:
        accelerator.print(f"notice: {line}")


@contextmanager
def running(args: TrainingArguments, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of the run's folder inside this context, and explain an out-of-memory error.

    Raises:
        UserError: another run holds the lock, or there is not enough memory.
    """
    with explain_out_of_memory(args), locked(args.run_dir, accelerator.is_main_process):
        yield


class OutOfMemory(UserError):
    """A run was out of memory."""

    def __init__(self, message: str, smaller: TrainingArguments | None) -> None:
        super().__init__(message)
        self.smaller = smaller  # the same run with smaller forward passes and the same global batch


@contextmanager
def explain_out_of_memory(args: TrainingArguments) -> Iterator[None]:
    """Turn an out-of-memory error into an OutOfMemory: one line with the run's settings and the flags that help."""
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
            raise UserError(f"out of memory{peak_memory}: end other programs that use memory, or give {hint}") from None
        if not args.gradient_checkpointing:
            hint = f"--gradient-checkpointing, or {hint}"
        if smaller := with_smaller_batches(args):
            flags = f"--batch-size {smaller.batch_size} --grad-accum {smaller.grad_accum}"
            hint = f"{flags} (the same effective batch), or {hint}"
        message = f"out of memory with --batch-size {args.batch_size} at {size}{peak_memory}: try {hint}"
        raise OutOfMemory(message, smaller) from None


def with_smaller_batches(args: TrainingArguments) -> TrainingArguments | None:
    """Return the arguments with at most half as many photos per forward pass and the same global batch.

    Return None if a forward pass has one photo already.
    """
    divisors = [d for d in range(1, args.batch_size // 2 + 1) if args.batch_size % d == 0]
    if not divisors:
        return None
    accumulated = args.grad_accum * args.batch_size // divisors[-1]
    return replace(args, batch_size=divisors[-1], grad_accum=accumulated)


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether the error says that the other processes of a run cannot be reached any more.

    The text is checked as well, because gloo, which connects processes on CPUs, raises a plain RuntimeError.
    """
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def run_script(main: Callable[[TrainingArguments], None], flags: TrainingArguments) -> None:
    """Run a training script, with the exit codes and the one-line errors of all programs of the toolkit.

    If one of several processes ends early, it ends without freeing its models and connections: torch's threads still
    use them, and freeing them can abort the process or wait without end (torch 2.13, gloo).

    Args:
        main: the function of the script that trains as its flags say.
    """
    gc.freeze()  # what was imported stays until the end, so the garbage collector need not look at it
    gc.enable()
    try:
        with one_line_errors():
            train_within_memory(main, flags)
    except SystemExit as ended:
        if not torch.distributed.is_initialized():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code)


def train_within_memory(main: Callable[[TrainingArguments], None], flags: TrainingArguments) -> None:
    """Train. With --auto-batch-size, continue with smaller batches after a run was out of memory.

    The run then continues from its newest checkpoint, or begins again if it has none.

    Args:
        main: see `run_script`.

    Raises:
        UserError: there is not enough memory, or another process of the run has ended.
    """
    while True:
        try:
            with explain_out_of_memory(flags):
                return main(flags)
        except OutOfMemory as error:
            if not flags.auto_batch_size or not error.smaller:
                raise
            flags = replace(error.smaller, resume=flags.resume or "latest")
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            reason = "another process of this run has ended, and its output says why"
            raise UserError(f"{reason}. So this process ends too; --resume latest continues the run") from None
        # outside of `except`, because the error holds the functions that were running, and so their tensors
        forget_models()
        gc.collect()
        torch.cuda.empty_cache()
        batches = f"--batch-size {flags.batch_size} --grad-accum {flags.grad_accum} (the same effective batch)"
        print(f"notice: out of memory: the run continues with {batches}")


def end_run(run: Run) -> None:
    """Record in run.json whether the run is complete, wait for all ranks, and end the trackers.

    After a stop signal, exit with its exit code. If one rank exits first, the launcher may kill the main process while
    it is writing. Without "finished", `--resume latest` would restart a run that has no checkpoints.

    Call it when nothing refers to the models any more. A model of several processes holds the process group. If it is
    freed after the group is destroyed, it waits for the group's threads, which can wait for this thread: the process
    then hangs (torch 2.13, gloo).
    """
    if run.accelerator.is_main_process and run.history and run.is_complete:
        file = run.args.run_dir / "run.json"
        write_json(file, read_json(file) | {"finished": True})
    run.stop.agree(run.accelerator)
    run.accelerator.wait_for_everyone()
    run.accelerator.free_memory()
    forget_models()
    gc.collect()  # the hooks of a model refer to it: only the garbage collector frees it
    run.accelerator.end_training()
    run.stop.exit(run.state, run.is_complete)
