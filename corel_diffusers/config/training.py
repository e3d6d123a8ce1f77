"""The flags that both training scripts share.

Parsing needs no torch, so `--help` and a refused flag answer at once.
"""

import importlib.util
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from corel_diffusers.config import flag_groups as groups
from corel_diffusers.config.checks import (
    SCENES,
    check_repo_id,
    flag_name,
    model_location,
    parse_size,
    require,
    require_cache,
    require_data_dir,
    require_usable,
    user_path,
)
from corel_diffusers.files import UserError


@dataclass(kw_only=True, frozen=True)
class TrainingArguments(
    groups.PhotoFlags,
    groups.LengthFlags,
    groups.OutputFlags,
    groups.IntervalFlags,
    groups.ModelFlags,
    groups.HubFlags,
    groups.OptimizerFlags,
    groups.SpeedFlags,
):
    """The flags that train_vae.py and train_unet.py share. They do not change: `resolved` returns a second object."""

    GROUPS: ClassVar[tuple[type, ...]]  # the groups of flags, most needed first
    MODEL: ClassVar[str]  # "vae" or "unet"
    PLANNED: ClassVar[tuple[str, ...]] = ("config", "image_size", "batch_size")
    LEARNING_RATES: ClassVar[dict[str, float]] = {}  # for the presets for which 1e-4 is not the best value
    CHECKPOINT_EVERY: ClassVar[int] = 10  # default of --checkpoint-every, epochs
    MUON_SCALE: ClassVar[float] = 30.0  # Muon's learning rate / AdamW's; the best measured value for tiny

    def path(self, value: str) -> Path:
        """Return a path that the user gave. A relative path starts at --base-dir, and ~ is the home folder."""
        return user_path(self.base_dir, value)

    @property
    def size_px(self) -> tuple[int, int] | None:
        """The (height, width) of --image-size in pixels, or None if it is unset."""
        return parse_size(self.image_size) if self.image_size else None

    @property
    def photo_source(self) -> str | Path:
        """The source of the photos for `load_photos`: a folder as a Path, or "scenes" or a Hub dataset as a string."""
        if self.dataset_name:
            return ":".join(filter(None, (self.dataset_name, self.dataset_config_name)))
        return SCENES if self.data_dir == SCENES else self.path(self.data_dir or ".")

    @property
    def init_location(self) -> Path | str | None:
        """The folder of --init-from as a Path, its Hub id as a string, or None."""
        return self.init_from and model_location(self.init_from, self.base_dir, "--init-from")

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.path(self.output_dir)

    @property
    def trackers(self) -> list[str]:
        """The trackers of --report-to that are installed."""
        chosen = groups.TRACKERS if self.report_to == "all" else {self.report_to} - {"none"}
        return [name for name in chosen if importlib.util.find_spec(name)]

    @property
    def optimizer_options(self) -> dict:
        """The arguments of `build_optimizer` that have flags of their own, without the learning rate."""
        return {
            "name": self.optimizer,
            "weight_decay": self.weight_decay,
            "muon_scale": self.MUON_SCALE,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
        }

    def settings(self) -> dict:
        """Return the flags that must not change when an interrupted run is resumed, as JSON values.

        The length of a run, its intervals and its folders may change. The photos, the VAE and the image size are left
        out because the run compares their contents instead of their names.
        """
        return {
            name: value
            for name, value in asdict(self).items()
            if not self.__dataclass_fields__[name].metadata.get("may_change")
        }

    @property
    def script(self) -> str:
        """The name of the script, without .py."""
        return f"train_{self.MODEL}"

    def checked(self) -> Self:
        """Check the values, and return the flags with --no-mixed-precision and the path of --config resolved.

        Raises:
            UserError: a value that no run can use.
        """
        require_usable(self)
        counts = ("grad_accum", "epochs", "batch_size", "max_train_steps", "max_train_samples")
        for name in (*counts, "validate_every", "sample_every", "checkpoint_every", "checkpoint_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more")
        minutes = self.max_train_minutes
        require(minutes is None or 0 < minutes < math.inf, "max_train_minutes", minutes, "give a number above 0")
        given = [flag_name(name) for name, value in self.length.items() if value]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other: give only one of them")
        for name in ("seed", "num_workers", "keep_checkpoints", "lr_min", "lr_warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "give 0 or more")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, value, "give a number above 0")
        if self.learning_rate:
            self.check_learning_rate()
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give a number from 0 to below 1")
        if self.image_size:
            parse_size(self.image_size)
        if self.dataset_name and self.data_dir:
            raise UserError("--dataset-name and --data-dir exclude each other: give only one of them")
        if self.dataset_config_name and (not self.dataset_name or ":" in self.dataset_name):
            raise UserError("--dataset-config-name belongs to --dataset-name: give --dataset-name user/name with it")
        if self.report_to != "none" and not self.trackers:
            name = "tensorboard" if self.report_to == "all" else self.report_to
            raise UserError(f"--report-to {self.report_to}: no such tracker is installed: pip install {name}")
        if self.no_mixed_precision:
            require(
                self.mixed_precision in ("auto", "no"),
                "mixed_precision",
                self.mixed_precision,
                "omit --no-mixed-precision",
            )
        if isinstance(self.photo_source, Path):
            require_data_dir(self.photo_source)
        require_cache()
        _ = self.init_location  # raises UserError if there is no such folder
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push-to-hub needs --hub-model-id user/name")
        if self.hub_model_id:
            check_repo_id(self.hub_model_id, "--hub-model-id")
        if self.checkpoint_every and self.checkpoint_steps:
            raise UserError("--checkpoint-every and --checkpoint-steps exclude each other: give only one of them")
        is_file = bool(self.config) and self.config.endswith(".json")
        if not is_file and self.config not in (None, "tiny", "base", "large"):
            raise UserError(f"--config {self.config} is unknown: give tiny, base, large or a JSON file")
        flags = replace(
            self,
            config=str(self.path(self.config)) if is_file else self.config,
            mixed_precision="no" if self.no_mixed_precision else self.mixed_precision,
        )
        flags.check_config_file()
        return flags

    @property
    def length(self) -> dict:
        """The flags for the length of a run. At most one of them is set."""
        return {name: getattr(self, name) for name in ("epochs", "max_train_steps", "max_train_minutes")}

    @property
    def planned(self) -> dict:
        """The flags that are planned if they are unset.

        They contain one flag for the length: the one that is set, or else --max-train-minutes.
        """
        length = {name: value for name, value in self.length.items() if value} or {"max_train_minutes": None}
        divided = {"grad_accum": self.grad_accum} if self.auto_batch_size else {}  # it changes with the batch size
        return {name: getattr(self, name) for name in self.PLANNED} | length | divided

    @property
    def timed(self) -> dict:
        """The flags that are set by timing a few steps if they are "auto"."""
        return {"mixed_precision": self.mixed_precision, "attention": self.attention}

    def check_config_file(self) -> None:
        """Raise UserError if --config is the path of a JSON file that does not exist."""
        exists = not self.config or not self.config.endswith(".json") or Path(self.config).is_file()
        require(exists, "config", self.config, "no such file: give tiny, base, large or a JSON file")

    def check_learning_rate(self) -> None:
        """Raise UserError if --lr-min is higher than --learning-rate."""
        require(
            self.lr_min is None or self.lr_min <= self.learning_rate,
            "lr_min",
            self.lr_min,
            f"give at most --learning-rate {self.learning_rate:g}",
        )

    def resolved(self, plan: dict) -> Self:
        """Return the arguments of the run.

        Flags that are unset or "auto" have the value of the plan. After that, flags whose defaults depend on other
        flags have their default.
        """
        unset = [name for name in self.PLANNED if getattr(self, name) is None]
        unset += [] if any(self.length.values()) else self.length
        # a run whose --auto-batch-size has divided the batches is resumed with this division
        unset += ["grad_accum"] if self.batch_size is None and "grad_accum" in plan else []
        timed = {name: plan.get(name, value) for name, value in self.timed.items() if value == "auto"}
        args = replace(self, **{name: plan.get(name) for name in unset}, **timed)
        args.check_config_file()
        args = replace(args, learning_rate=args.learning_rate or args.LEARNING_RATES.get(args.config, 1e-4))
        args.check_learning_rate()
        if args.lr_min is None:
            args = replace(args, lr_min=1e-5 if args.learning_rate >= 1e-5 else args.learning_rate / 10)
        return args
