"""A run's state and its checkpoints: written, found, checked against the flags, and loaded."""

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as torch_state

from corel_diffusers.arguments import TrainingArguments
from corel_diffusers.data.cache import digest
from corel_diffusers.files import UserError, flush_folder, read_json, remove_folder, write_json
from corel_diffusers.learning_rate import LearningRate
from corel_diffusers.models import load_config
from corel_diffusers.processes import of_main_process, on_main_process
from corel_diffusers.sharding import from_first, whole


@dataclass
class RunState:
    """What a run knows beside the weights; saved as JSON in each checkpoint, so every value is a plain number or a list."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf  # lowest validation loss
    to_beat: float = math.inf  # by early_stopping_delta, or the validation counts as one of waiting
    validations_waited: int = 0
    recent: list[float] = field(default_factory=list)  # the watched losses of the oscillation window
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)  # the current epoch's training values, of so many forward passes
    kl_weight: float = 0.0
    stop_reason: str = ""


class Trained(NamedTuple):
    """A model that is trained, as accelerate prepared it, and its optimizer, prepared or plain. name: of their files in a checkpoint."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizer without accelerate's wrapper; the parts of muon.Together."""
        plain = getattr(self.optimizer, "optimizer", self.optimizer)
        return getattr(plain, "parts", (plain,))

    def save(self, accelerator: Accelerator, folder: Path) -> None:
        """Writes weights and the optimizer's state by the weights' names. Called on every rank, the first of which writes."""
        options = torch_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = torch_state.get_model_state_dict(self.model, options=options)
        moments = {}  # of an optimizer that has made no step: asked for its state, it would make one
        if any(optimizer.state for optimizer in self.optimizers):
            moments = torch_state.get_optimizer_state_dict(self.model, self.optimizers, options=options).get("state", {})  # of the first
        if accelerator.is_main_process:
            named = {f"{weight}.{name}": value for weight, values in moments.items() for name, value in values.items()}
            for name, tensors in ((self.name, weights), (f"{self.name}_optimizer", named)):
                save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")

    def load(self, accelerator: Accelerator, folder: Path) -> None:
        """Reads in place what `save` wrote. Called on every rank; the first one reads and tells the others."""
        weights, named = (
            load_file(folder / f"{name}.safetensors") if accelerator.is_main_process else {}
            for name in (self.name, f"{self.name}_optimizer")
        )
        options = torch_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
        torch_state.set_model_state_dict(self.model, weights, options=options)
        if not of_main_process(accelerator, bool(named)):
            return
        moments = torch_state.get_optimizer_state_dict(self.model, self.optimizers)
        moments["state"] = {weight: dict(values) for weight, values in moments["state"].items()}  # not the optimizer's own
        for key, value in named.items():
            weight, _, name = key.rpartition(".")
            moments["state"][weight][name] = value
        torch_state.set_optimizer_state_dict(self.model, self.optimizers, moments, options=options)
        for optimizer in self.optimizers:
            for weight, values in optimizer.state.items():  # in memory as the weight lies there, which fused optimizers rely on
                values |= {name: torch.empty_like(weight).copy_(value) for name, value in values.items() if value.shape == weight.shape}


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; what was cut off while being written bears another name."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Of a checkpoint's folder, or a snapshot's file."""
    return int(path.stem.removeprefix("step-"))


def save_checkpoint(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: RunState,
    settings: dict,
    trained: Sequence[Trained],
    rate: LearningRate,
    ema: EMAModel | None,
) -> None:
    """Writes all that resume needs beside its place, renames it into place, removes the oldest beyond --keep-checkpoints.

    Called on every rank; the first one writes. It is all safetensors and JSON: accelerate would pickle it and, on loading, unpickle
    whatever a user points at. No generator's state is among it: what is random derives from the step.
    """
    path = args.run_dir / "checkpoints" / f"step-{state.step:06d}"
    beside = path.with_name(f".{path.name}.partial")
    if accelerator.is_main_process:
        for half in path.parent.glob(".step-*"):  # whose writing or removal was cut off
            shutil.rmtree(half)
        beside.mkdir(parents=True)
    for part in trained:
        part.save(accelerator, beside)
    averages = {}
    for place, parameter in enumerate(ema.shadow_params if ema else ()):
        value = whole(parameter)  # on every rank
        if accelerator.is_main_process:
            averages[str(place)] = value.cpu().contiguous()
    if accelerator.is_main_process:
        if ema:
            save_file(averages, beside / "ema.safetensors")
        values = {"state": asdict(state), "settings": settings, "learning_rate": rate.state_dict()}
        values["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else {}
        write_json(beside / "state.json", values)
        flush_folder(beside)  # after a power cut, the newest checkpoint must not be one of empty files
        remove_folder(path)
        os.replace(beside, path)
        flush_folder(path.parent)
        for old in find_checkpoints(args.run_dir)[: -args.keep_checkpoints] if args.keep_checkpoints else ():
            remove_folder(old)
    accelerator.wait_for_everyone()


DIFFERENCES = {  # of what is no flag, or is compared by its content
    "global_batch": "the global batch (batch size x accumulation x devices: --grad-accum makes up for fewer devices) was {was}, is {now}",
    "photos": "the photos are others: some were added, removed, split anew, or cannot be read",
    "config": "the content of --config is another",
    "vae": "the weights of --vae-checkpoint are others",
    "vae_config": "the config of --vae-checkpoint is another",
    "scale": "the scale of the latents of --vae-checkpoint is another",
}


def run_settings(args: TrainingArguments, photos: DatasetDict, model: str, **more: object) -> dict:
    """What an interrupted run and its continuation must share: the flags that bear on the weights, and the photos.

    Photos count by name, label and split, not by folder: a run may go on where its data have moved. A config counts by content.
    """
    rows = [(split, part["file_name"][:], part["label"][:]) for split, part in photos.items()]
    return args.settings() | {"photos": digest(rows), "config": digest(load_config(model, args.config))} | more


def mark_finished(args: TrainingArguments) -> None:
    """Notes in run.json that the run came to its end: without checkpoints, it is not begun anew over its own model."""
    write_json(args.run_dir / "run.json", read_json(args.run_dir / "run.json") | {"finished": True})


def find_resume(accelerator: Accelerator, args: TrainingArguments, settings: dict) -> Path | None:
    """What --resume names, on every rank: the first one looks, which may be the only one whose machine has it."""
    return on_main_process(accelerator, partial(resumed_checkpoint, args, settings))


def resumed_checkpoint(args: TrainingArguments, settings: dict) -> Path | None:
    """The checkpoint that --resume names: the newest whole one for "latest" (None where there is none yet), or a path.

    Raises UserError where the path is no checkpoint of this run, and where the settings are others than the run's, with the
    list of what differs.
    """
    if args.resume is None:
        return None
    known = find_checkpoints(args.run_dir)
    if args.resume == "latest":
        if not known:
            run = args.run_dir / "run.json"
            if run.is_file() and read_json(run)["finished"]:
                raise UserError(
                    f"--resume latest: {args.run_dir} holds a finished run whose checkpoints are gone: give another --output-dir"
                )
            print(f"no checkpoint in {args.run_dir} yet: starting from the beginning")
            return None
        checkpoint = known[-1]
    else:
        wanted = args.path(args.resume).resolve()
        checkpoint = next((path for path in known if path.resolve() == wanted), None)
        if checkpoint is None:
            there = f"there are {', '.join(path.name for path in known)}" if known else "it has none yet"
            raise UserError(f"--resume {args.resume} is no checkpoint of --output-dir {args.run_dir}: {there}; or give latest")
    fresh = type(args)(config=args.config, image_size=args.image_size)
    fresh.fill({})
    defaults, now = (json.loads(json.dumps(values)) for values in (fresh.settings(), settings))
    unnoted = {name: now[name] for name in ("vae_config", "arithmetic") if name in now}  # by older versions: these count as unchanged
    # a flag that is newer than the run had its default
    saved = defaults | unnoted | read_json(checkpoint / "state.json")["settings"]
    if saved.get("arithmetic") != now.get("arithmetic"):
        was = f"{saved['arithmetic']} when the run began, {now['arithmetic']} here"
        print(f"notice: latents are computed otherwise ({was}): the run goes on, but not to the last bit as it would have there")
    differing = [
        DIFFERENCES.get(name, name.replace("_", "-") + " was {was}, is {now}").format(was=saved.get(name), now=now.get(name))
        for name in sorted({*saved, *now} - {"arithmetic"})
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(f"--resume {args.resume}: {'; '.join(differing)}: give the run's own settings, or another --output-dir")
    print(f"resuming from {checkpoint}")
    return checkpoint


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path | None, trained: Sequence[Trained], rate: LearningRate, ema: EMAModel | None
) -> RunState:
    """Loads models, optimizers, EMA and learning rate in place; returns the state. Without a checkpoint: a fresh state.

    Checkpoints newer than this one go: the run writes them again, and "latest" must not mean them before it has.
    """
    if checkpoint is None:
        return RunState()
    reads, several = accelerator.is_main_process, accelerator.num_processes > 1
    saved = of_main_process(accelerator, read_json(checkpoint / "state.json") if reads else None)
    if "scaler" in saved:
        for part in trained:
            part.load(accelerator, checkpoint)
        if accelerator.scaler and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
    else:
        prepared = accelerator._optimizers
        accelerator._optimizers = [part.optimizer for part in trained]  # that version prepared each by itself
        accelerator.load_state(str(checkpoint))  # accelerate's own files, which it wrote
        accelerator._optimizers = prepared
    state = RunState(**{name: value for name, value in saved["state"].items() if name in RunState.__dataclass_fields__})
    rate.load_state_dict(saved["learning_rate"])
    if ema:
        values = load_file(checkpoint / "ema.safetensors") if reads else {}
        for place, parameter in enumerate(ema.shadow_params):
            value = values[str(place)] if reads else torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(from_first(value.to(parameter.device), parameter, several))
        ema.optimization_step = state.step
    if reads:
        for newer in find_checkpoints(checkpoint.parent.parent):
            if step_of(newer) > step_of(checkpoint):
                remove_folder(newer)
    return state
