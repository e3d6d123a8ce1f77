"""Open the folder of a run: run.json, the list of its photos, and the metrics so far."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from datasets import DatasetDict

from corel_diffusers.config.command_line import command_line, given_flags
from corel_diffusers.data.training_photos import TRAINING_PHOTOS, training_photos
from corel_diffusers.files import read_metrics, write_json, write_text
from corel_diffusers.runtime.devices import device_name
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.saved_models import ENTRY_FILES, finish_model_save
from corel_diffusers.training.run import Run
from corel_diffusers.training.trackers import start_trackers

METRICS = "metrics.jsonl"  # in the folder of the run, and in each checkpoint


def open_run_dir(run: Run, photos: DatasetDict, models: Sequence[Path | str | None] = (), **more: object) -> None:
    """Write run.json, training_photos.txt and metrics.jsonl, start the trackers, and read the metrics so far.

    Args:
        models: the trained models that this run builds on. Their training photos are added to those of this run.
        more: more entries for run.json.
    """
    args, accelerator, state = run.args, run.accelerator, run.state
    run.length.allow_slow_start(state, accelerator)
    if accelerator.is_main_process:
        finish_model_save(args.run_dir)
    restore_history(run, repeats_exactly=args.resume == "latest" and not args.max_train_minutes)
    if accelerator.is_main_process:
        seen_before = [name for model in models if model for name in training_photos(model)]
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
                "command": command_line(args),
                "flags": given_flags(args),
                "plan": args.planned | args.timed,
                "device": device_name(accelerator),
                "data": data,
                "base_model": args.init_location if isinstance(args.init_location, str) else None,
            }
            | more,
        )
    start_trackers(args, accelerator)


def restore_history(run: Run, repeats_exactly: bool) -> None:
    """Set the history of the run to the metrics up to the step of its state, and remove later lines of metrics.jsonl.

    The run will write these again. A checkpoint has a copy of the metrics: if the file in the run's folder was damaged,
    it is restored from there.

    A removed line may belong to a model that was saved as best. If the run does not repeat its steps exactly, it may
    not reach this model again. No line would then describe the model in the folder of the run. In this case, the next
    validation saves its model as best.

    Args:
        repeats_exactly: whether the run repeats each removed step exactly. It does not if it continues from an older
            checkpoint than the latest, if it ends by time, or if its learning rate has changed.
    """
    all_records = broadcast_from_main(run.accelerator, read_metrics(run.args.run_dir / METRICS))
    run.history = [record for record in all_records if record["step"] <= run.state.step]
    removed = all_records[len(run.history) :]
    has_model = any((run.args.run_dir / name).is_file() for name in ENTRY_FILES)
    was_removed = not repeats_exactly and any(record.get("published") for record in removed)
    # without a model, the checkpoint was copied from another folder
    if run.checkpoint and (was_removed or not broadcast_from_main(run.accelerator, has_model)):
        run.state.best = math.inf
    if run.checkpoint and run.accelerator.is_main_process and (run.checkpoint / METRICS).is_file():
        saved = read_metrics(run.checkpoint / METRICS)
        if saved != run.history:
            print(f"notice: {METRICS} was damaged or missing: it is restored from {run.checkpoint.name}")
            run.history = saved
    run.history = broadcast_from_main(run.accelerator, run.history)
    if run.accelerator.is_main_process:
        write_text(run.args.run_dir / METRICS, text_of(run.history))


def text_of(records: list[dict]) -> str:
    """Return the content of metrics.jsonl."""
    return "".join(json.dumps(record) + "\n" for record in records)
