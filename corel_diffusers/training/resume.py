"""Begin a run, or resume it: find its checkpoint and compare the settings."""

import json
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from datasets import DatasetDict

from corel_diffusers.config.checks import flag_name
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.data.cache import digest
from corel_diffusers.data.pixels import Pixels
from corel_diffusers.files import UserError, read_json
from corel_diffusers.models.configs import load_config
from corel_diffusers.runtime.processes import broadcast_from_main, run_on_main
from corel_diffusers.saved_models import MANIFEST
from corel_diffusers.training.checkpoints import damage, find_checkpoints, read_state
from corel_diffusers.training.length import RunLength
from corel_diffusers.training.run import Run
from corel_diffusers.training.running_mean import RunningMean
from corel_diffusers.training.state import RunState

PICKLE_ENDINGS = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
DIFFERENCES = {  # messages for settings that are not flags, and for files that are compared by content
    "global_batch": "the global batch (batch size x accumulation x devices; "
    "raise --grad-accum if there are fewer devices) was {was}, is {now}",
    "size_px": "image-size was {was}, is {now}",
    "photos": "the photos have changed (some were added or removed, the split is new, or some cannot be read)",
    "mixed_precision": "mixed-precision was {was}, is {now} (--change-precision continues in the new one)",
    "config": "the content of --config has changed",
    "vae": "the weights of --vae-checkpoint have changed",
    "vae_config": "the config of --vae-checkpoint has changed",
    "scale": "the latent scale of --vae-checkpoint has changed",
}


def begin_or_resume(
    args: TrainingArguments,
    accelerator: Accelerator,
    photos: DatasetDict,
    pixels: dict[str, Pixels],
    began: float,
    **more: object,
) -> Run:
    """Return the run, at its beginning or in the state of the checkpoint of --resume.

    The weights are not loaded: see `checkpoints.load`.

    Args:
        photos: the photos by split.
        pixels: their pixels by split.
        began: time.monotonic() at the start of this process.
        more: settings that must not change when the run is resumed, in addition to those of `run_settings`.

    Raises:
        UserError: see `resumed_checkpoint`.
    """
    plan = BatchPlan.of(args, accelerator, [rows for rows, _ in pixels["train"].by_size()])
    settings = run_settings(args, photos, global_batch=plan.global_batch, **more)
    # the main process searches for the checkpoint, because the files may be on its machine only
    checkpoint = run_on_main(accelerator, partial(resumed_checkpoint, args, settings))
    saved = read_state(checkpoint) if checkpoint and accelerator.is_main_process else RunState()
    state = broadcast_from_main(accelerator, saved)
    length, means = RunLength.of(args, plan, state, began), RunningMean(state, accelerator.device)
    run = Run(args, accelerator, plan, settings, checkpoint, state, length, means)
    if checkpoint and run.is_over:
        flag = next(name for name in ("max_train_minutes", "max_train_steps", "epochs") if getattr(args, name))
        accelerator.print(f"notice: the run is complete: to train longer, give a larger {flag_name(flag)}")
    return run


def run_settings(args: TrainingArguments, photos: DatasetDict, **more: object) -> dict:
    """Return the settings that must not change on resume: the flags that affect the weights, and the photos.

    The photos are compared by name, label and split. Captions and folders are not compared, so the data may move to
    another folder. A config is compared by its content.
    """
    rows = [(split, part["file_name"][:], part["label"][:]) for split, part in photos.items()]
    return args.settings() | {"photos": digest(rows), "config": digest(load_config(args.MODEL, args.config))} | more


def newest_whole(run_dir: Path, checkpoints: list[Path]) -> Path:
    """Return the newest checkpoint that is not damaged, and print a notice for each damaged one.

    Raises:
        UserError: all are damaged, or one has pickles.
    """
    for checkpoint in reversed(checkpoints):
        refuse_pickles(checkpoint)
        if not (reason := damage(checkpoint)):
            if not (checkpoint / MANIFEST).is_file():
                print(f"notice: {checkpoint.name} has no {MANIFEST}: damage to its files would not be noticed")
            return checkpoint
        print(f"notice: {checkpoint.name} is damaged ({reason}): it is not used")
    raise UserError(f"--resume latest: all checkpoints in {run_dir} are damaged: start again in another --output-dir")


def refuse_pickles(checkpoint: Path) -> None:
    """Raise UserError if a checkpoint has pickles, as those of earlier versions have. A pickle can run code."""
    if pickles := sorted(file.name for file in checkpoint.iterdir() if file.suffix in PICKLE_ENDINGS):
        raise UserError(
            f"--resume: {checkpoint} has pickles ({', '.join(pickles)}), which are not loaded: "
            "start again in another --output-dir, or with --init-from"
        )


def resumed_checkpoint(args: TrainingArguments, settings: dict) -> Path | None:
    """Return the checkpoint of --resume, which is "latest" or a path. Return None to start from the beginning.

    "latest" is the newest complete checkpoint, or None if the run has none yet.

    Raises:
        UserError: the path is not a checkpoint of this run; or the run has finished and its checkpoints were removed;
            or the settings differ from those of the run. The message lists the differences.
    """
    if args.resume is None:
        return None
    checkpoints = find_checkpoints(args.run_dir)
    if args.resume == "latest":
        if not checkpoints:
            run = args.run_dir / "run.json"
            if run.is_file() and read_json(run)["finished"]:
                raise UserError(
                    f"--resume latest: {args.run_dir} holds a finished run without checkpoints: "
                    "give another --output-dir"
                )
            print(f"no checkpoint in {args.run_dir} yet: starting from the beginning")
            return None
        checkpoint = newest_whole(args.run_dir, checkpoints)
    else:
        wanted = args.path(args.resume).resolve()
        checkpoint = next((path for path in checkpoints if path.resolve() == wanted), None)
        if checkpoint is None:
            names = f"it has {', '.join(path.name for path in checkpoints)}" if checkpoints else "it has none yet"
            raise UserError(
                f"--resume {args.resume} is not a checkpoint of --output-dir {args.run_dir} ({names}): "
                "give one of its checkpoints, or latest"
            )
        refuse_pickles(checkpoint)
        if reason := damage(checkpoint):
            raise UserError(f"--resume {args.resume}: {reason}: give another checkpoint, or latest")
    default_args = type(args)(config=args.config, image_size=args.image_size).resolved({})
    defaults, now = (json.loads(json.dumps(values)) for values in (default_args.settings(), settings))
    # older versions did not save these: they count as unchanged
    unrecorded = {name: now[name] for name in ("vae_config", "arithmetic", "channels") if name in now}
    # a flag that did not exist when the run began counts as its default
    saved = defaults | unrecorded | read_json(checkpoint / "state.json")["settings"]
    if saved.get("arithmetic") != now.get("arithmetic"):
        was = f"{saved['arithmetic']} when the run began, {now['arithmetic']} now"
        print(
            f"notice: the arithmetic that computes the latents has changed ({was}): "
            "the run continues, but its results will differ in the last bits"
        )
    free = {"arithmetic"}
    if args.change_precision and saved["mixed_precision"] != now["mixed_precision"]:
        free.add("mixed_precision")
        print(
            f"notice: the run began with --mixed-precision {saved['mixed_precision']} and continues with "
            f"{now['mixed_precision']}: it will not end with the weights of a run without an interruption"
        )
    differing = [
        DIFFERENCES.get(name, name.replace("_", "-") + " was {was}, is {now}").format(
            was=saved.get(name), now=now.get(name)
        )
        for name in sorted({*saved, *now} - free)
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"--resume {args.resume}: {'; '.join(differing)}: give the original flags "
            f"(--config-file {args.run_dir / 'run.json'} gives all of them), or another --output-dir"
        )
    print(f"resuming from {checkpoint}")
    return checkpoint
