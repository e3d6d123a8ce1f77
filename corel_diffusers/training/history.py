"""Open the folder of a run: run.json, the list of its photos, and the metrics so far."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from datasets import DatasetDict

from corel_diffusers.config.command_line import command_line, given_flags
from corel_diffusers.data.training_photos import TRAINING_PHOTOS, training_photos
from corel_diffusers.files import finish_model_save, read_metrics, write_json, write_text
from corel_diffusers.runtime.devices import device_name
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.training.run import Run


def open_run_dir(run: Run, photos: DatasetDict, models: Sequence[Path | str | None] = (), **more: object) -> None:
    """Write run.json, training_photos.txt and metrics.jsonl, start the trackers, and read the metrics so far.

    A resumed run keeps the metrics up to the step of the state. The later lines are removed, because the run will write
    them again.

    A removed line may belong to a model that was saved as best. If the run resumes from an older checkpoint than the
    latest, or ends by time, it may not reach this model again. No line would then describe the model in the run folder.
    In this case, the next validation saves its model as best.

    Args:
        models: the trained models that this run builds on. Their training photos are added to those of this run.
        more: more entries for run.json.

    Raises:
        UserError: the minutes of the run are over before its first step. Nothing has been written then.
    """
    args, accelerator, state = run.args, run.accelerator, run.state
    run.length.check_slow_start(state, accelerator)
    path = args.run_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        finish_model_save(args.run_dir)
    all_records = broadcast_from_main(accelerator, read_metrics(path))
    run.history = [record for record in all_records if record["step"] <= state.step]
    # the resumed run will repeat each removed step exactly
    repeats_exactly = args.resume == "latest" and not args.max_train_minutes
    removed = all_records[len(run.history) :]
    if args.resume and not repeats_exactly and any(record.get("published") for record in removed):
        state.best = math.inf
    if accelerator.is_main_process:
        write_text(path, "".join(json.dumps(record) + "\n" for record in run.history))
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
            }
            | more,
        )
    accelerator.init_trackers(args.script)
