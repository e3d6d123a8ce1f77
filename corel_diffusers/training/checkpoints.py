"""Save, find and load the checkpoints of a training run."""

import math
import os
import re
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as torch_state

from corel_diffusers.files import (
    UserError,
    explain_full_disk,
    fsync_folder,
    read_json,
    remove_folder,
    require_space,
    write_json,
    write_text,
)
from corel_diffusers.runtime.processes import broadcast_from_main, run_on_main
from corel_diffusers.runtime.sharding import full_tensor, shard_from_main
from corel_diffusers.saved_models import changed_files, write_manifest
from corel_diffusers.training.history import METRICS, text_of
from corel_diffusers.training.learning_rate import LearningRate
from corel_diffusers.training.optimizers import Muon
from corel_diffusers.training.run import Run
from corel_diffusers.training.state import RunState


class Trained(NamedTuple):
    """A model prepared by accelerate, its optimizer (prepared or plain), and the name of their checkpoint files."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizer without accelerate's wrapper. A CombinedOptimizer has several: Muon and AdamW."""
        plain = getattr(self.optimizer, "optimizer", self.optimizer)
        return getattr(plain, "parts", (plain,))

    def save(self, accelerator: Accelerator, folder: Path) -> None:
        """Save the weights, and the optimizer state under the names of the weights.

        Call it on every rank. Only the main process writes.
        """
        options = torch_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = torch_state.get_model_state_dict(self.model, options=options)
        optimizer_state = {}
        # Before the first step there is no state. get_optimizer_state_dict would make a step to create it.
        if any(optimizer.state for optimizer in self.optimizers):
            # only the main process receives a "state"
            optimizer_state = torch_state.get_optimizer_state_dict(self.model, self.optimizers, options=options).get(
                "state", {}
            )
        if accelerator.is_main_process:
            named = {
                f"{weight}.{name}": value
                for weight, values in optimizer_state.items()
                for name, value in values.items()
            }
            for name, tensors in ((self.name, weights), (f"{self.name}_optimizer", named)):
                save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")

    def load(self, accelerator: Accelerator, folder: Path) -> None:
        """Load the files of `save` in place.

        Call it on every rank. The main process reads the files and broadcasts the tensors.
        """
        weights, named = (
            load_file(folder / f"{name}.safetensors") if accelerator.is_main_process else {}
            for name in (self.name, f"{self.name}_optimizer")
        )
        options = torch_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
        torch_state.set_model_state_dict(self.model, weights, options=options)
        for optimizer in self.optimizers:
            optimizer.state.clear()  # a run that goes back has one
        if not broadcast_from_main(accelerator, bool(named)):
            return
        optimizer_state = torch_state.get_optimizer_state_dict(self.model, self.optimizers)
        # copied, because these dicts belong to the optimizer
        optimizer_state["state"] = {weight: dict(values) for weight, values in optimizer_state["state"].items()}
        for key, value in named.items():
            weight, _, name = key.rpartition(".")
            optimizer_state["state"][weight][name] = value
        torch_state.set_optimizer_state_dict(self.model, self.optimizers, optimizer_state, options=options)
        for optimizer in self.optimizers:
            # fused optimizers need their state in the memory layout of the weight
            for weight, values in optimizer.state.items():
                values |= {
                    name: torch.empty_like(weight).copy_(value)
                    for name, value in values.items()
                    if value.shape == weight.shape
                }


class Parts(NamedTuple):
    """The parts of a run that a checkpoint stores in addition to the RunState."""

    trained: list[Trained]
    rate: LearningRate
    ema: EMAModel | None


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first.

    A checkpoint whose saving was interrupted has another name, so it is not in the list.
    """
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint folder or of a snapshot file."""
    return int(path.stem.removeprefix("step-"))


def damage(checkpoint: Path) -> str:
    """Return what is damaged in a checkpoint, or "" if it is whole."""
    if not (checkpoint / "state.json").is_file():
        return "state.json is missing"
    return next((f"{name} {reason}" for name, reason in changed_files(checkpoint).items()), "")


def read_state(checkpoint: Path) -> RunState:
    """Return the state of the run in a checkpoint. Entries of other versions are ignored."""
    saved = read_json(checkpoint / "state.json")["state"]
    return RunState(**{name: value for name, value in saved.items() if name in RunState.__dataclass_fields__})


def require_space_for_run(run: Run, parts: Parts) -> None:
    """Print how much a checkpoint takes on the disk.

    Raises:
        UserError: the disk has no space for the checkpoints that are kept, the one that is being saved and a model.
    """
    weights = sum(map(num_bytes, (p for part in parts.trained for p in part.model.parameters())))
    averages = sum(map(num_bytes, parts.ema.shadow_params)) if parts.ema else 0
    moments = 0
    for optimizer in (optimizer for part in parts.trained for optimizer in part.optimizers):
        copies = 1 if isinstance(optimizer, Muon) else 2  # AdamW has two moments
        moments += copies * sum(num_bytes(p) for group in optimizer.param_groups for p in group["params"])
    size, keep, found = weights + averages + moments, run.args.keep_checkpoints, find_checkpoints(run.args.run_dir)
    missing = max(keep - len(found), 0) + 1  # while a checkpoint is saved, there is one more than are kept
    run_on_main(run.accelerator, partial(require_space, run.args.run_dir, "--output-dir", weights + missing * size))
    kept = f"the newest {keep} are kept" if keep else "all are kept"
    run.accelerator.print(f"a checkpoint takes {size / 1e6:,.0f} MB, and {kept} (--keep-checkpoints)")


def num_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor, or of all parts of a tensor that is sharded."""
    return tensor.numel() * tensor.element_size()


def save(run: Run, parts: Parts) -> None:
    """Save everything that resuming needs, then remove the oldest checkpoints beyond --keep-checkpoints.

    The files are written to a temporary folder. That folder is renamed when it is complete, so an incomplete checkpoint
    is never found. Call it on every rank. Only the main process writes.

    All files are safetensors or JSON. accelerate uses pickle, and a pickle file from a stranger can run code when
    it is loaded. No state of a random generator is saved, because every random value is derived from the step.
    """
    accelerator, ema = run.accelerator, parts.ema
    refuse_broken_values(run, parts)
    run.means.store(run.state, accelerator)
    path = run.args.run_dir / "checkpoints" / f"step-{run.state.step:06d}"
    temporary = path.with_name(f".{path.name}.partial")
    with explain_full_disk(run.args.run_dir, "--output-dir"):
        if accelerator.is_main_process:
            for leftover in path.parent.glob(".step-*"):  # from a save or a removal that was interrupted
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        for part in parts.trained:
            part.save(accelerator, temporary)
        averages = {}
        for index, parameter in enumerate(ema.shadow_params if ema else ()):
            value = full_tensor(parameter)  # a collective operation, so every rank calls it
            if accelerator.is_main_process:
                averages[str(index)] = value.cpu().contiguous()
        if accelerator.is_main_process:
            if ema:
                save_file(averages, temporary / "ema.safetensors")
            values = {"state": asdict(run.state), "settings": run.settings, "learning_rate": parts.rate.state_dict()}
            values["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else {}
            write_json(temporary / "state.json", values)
            write_text(temporary / METRICS, text_of(run.history))
            write_manifest(temporary)
            fsync_folder(temporary)  # otherwise a power cut could leave a checkpoint of empty files
            remove_folder(path)
            os.replace(temporary, path)
            fsync_folder(path.parent)
            keep = run.args.keep_checkpoints
            for old in find_checkpoints(run.args.run_dir)[:-keep] if keep else ():
                remove_folder(old)
    accelerator.wait_for_everyone()


def values_are_finite(parts: Parts) -> bool:
    """Return whether no weight, no averaged weight and no value in the state of an optimizer is NaN or infinite."""
    values = list(parts.ema.shadow_params) if parts.ema else []
    for part in parts.trained:
        values += part.model.parameters()
        states = [state for optimizer in part.optimizers for state in optimizer.state.values()]
        values += [value for state in states for value in state.values() if torch.is_tensor(value) and value.ndim]
    return math.isfinite(float(full_tensor(torch.nn.utils.get_total_norm(values))))


def refuse_broken_values(run: Run, parts: Parts) -> None:
    """Raise UserError if a value of the checkpoint is NaN or infinite. Such a checkpoint would replace a good one."""
    if values_are_finite(parts):
        return
    rate = run.args.learning_rate
    raise UserError(
        f"a weight or a value of the optimizer is NaN or infinite at step {run.state.step}, so no checkpoint is saved: "
        f"continue from the last one with --resume latest; if it happens again, try --lr {rate / 3:.1g} (was {rate:g}) "
        "with another --output-dir"
    )


def load(run: Run, parts: Parts) -> None:
    """Load models, optimizers, EMA and learning rate in place, if the run is resumed.

    Checkpoints newer than the one that is loaded are removed: the run will write them again, and until then "latest"
    must not select them.
    """
    accelerator, checkpoint, ema = run.accelerator, run.checkpoint, parts.ema
    if checkpoint is None:
        return
    is_main, is_distributed = accelerator.is_main_process, accelerator.num_processes > 1
    saved = broadcast_from_main(accelerator, read_json(checkpoint / "state.json") if is_main else None)
    for part in parts.trained:
        part.load(accelerator, checkpoint)
    if accelerator.scaler and saved.get("scaler"):
        accelerator.scaler.load_state_dict(saved["scaler"])
    parts.rate.load_state_dict(saved["learning_rate"])
    if ema:
        values = load_file(checkpoint / "ema.safetensors") if is_main else {}
        for index, parameter in enumerate(ema.shadow_params):
            value = values[str(index)] if is_main else torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(shard_from_main(value.to(parameter.device), parameter, is_distributed))
        ema.optimization_step = run.state.step
    if is_main:
        for newer in find_checkpoints(checkpoint.parent.parent):
            if step_of(newer) > step_of(checkpoint):
                remove_folder(newer)
