"""The flags that both training scripts share.

Parsing needs no torch, so `--help` and a refused flag answer at once.
"""

import importlib.util
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import tyro

from corel_diffusers.config.checks import (
    SCENES,
    flag,
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

OUR_LR_SCHEDULES = ("cosine", "cosine_warm_restarts", "plateau", "none")  # see training/learning_rate.py
LR_SCHEDULERS = Literal[
    *OUR_LR_SCHEDULES,
    *("linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),  # of diffusers
]


@dataclass(kw_only=True, frozen=True)
class TrainingArguments:
    """The flags that train_vae.py and train_unet.py share. They do not change: `resolved` returns a second object."""

    MODEL: ClassVar[str]  # "vae" or "unet"
    PLANNED: ClassVar[tuple[str, ...]] = ("config", "image_size", "batch_size")
    LEARNING_RATES: ClassVar[dict[str, float]] = {}  # for the presets for which 1e-4 is not the best value
    CHECKPOINT_EVERY: ClassVar[int] = 10  # default of --checkpoint-every, epochs
    MUON_SCALE: ClassVar[float] = 30.0  # Muon's learning rate / AdamW's; the best measured value for tiny

    # photos
    data_dir: Annotated[str | None, tyro.conf.arg(aliases=["--image-dir"])] = flag(None, may_change=True)
    """Folder of photos: prepared, raw Corel, one folder per class, or flat. "scenes": this package draws the photos."""
    dataset_name: str | None = flag(None, may_change=True)
    """Id of a Hub dataset, instead of --data-dir."""
    classes: tuple[str, ...] = ()
    """Train only on these classes, given by name or number (default: all)."""
    max_train_samples: int | None = None
    """Use at most this many training photos."""
    image_size: str | None = flag(None, may_change=True)
    """Image size in pixels: 128, or 96x144 (height x width)."""
    aspect_buckets: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train on a few image sizes with about the area of --image-size, so that photos of every shape keep their frame.
    Each photo has the size that cuts off the least, and each batch has one size.
    Without this flag, the centre of each photo is cut to the shape of --image-size."""
    num_workers: int = flag(0, may_change=True, in_card=False)
    """Number of processes that load batches in advance.
    Pixels and latents are computed once and cached, so 0 is fastest on most machines."""

    # folders
    output_dir: str = flag(".", may_change=True)
    """Folder of the run: the model, metrics.jsonl, plots, samples, checkpoints."""
    base_dir: str = flag(".", may_change=True, in_card=False)
    """Folder at which relative paths start."""

    config_file: str | None = flag(None, may_change=True, in_card=False)
    """YAML or JSON file with flags, as lines `image-size: 64`, or the run.json of a run.
    Flags on the command line have precedence."""

    # model
    config: str | None = flag(None, may_change=True)
    """Model size: tiny, base, large, or the path of a diffusers config JSON."""
    init_from: str | None = flag(None, may_change=True)
    """Begin with the weights of a trained model of the same config: the --output-dir of a run, or a Hub id."""
    gradient_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Recompute activations in the backward pass instead of storing them.
    The gradients are the same. Training needs less memory and is slower."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Compile the model with torch.compile after the first steps.
    Compiling takes minutes. The script prints whether the run saves more time than that."""
    cuda_graphs: bool = flag(True, may_change=True)
    """On one GPU, record the forward and backward pass as CUDA graphs, and replay them if that is faster."""

    # length and batch size
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True, in_card=False)
    """Print the plan of the run and exit. The plan depends on the photos, the speed of this machine and the minutes."""
    epochs: int | None = flag(None, may_change=True)
    """Number of epochs. One epoch is one pass over the training photos."""
    max_train_steps: int | None = flag(None, may_change=True)
    """Number of optimizer steps, instead of --epochs."""
    max_train_minutes: float | None = flag(None, may_change=True)
    """Length of the run in minutes, instead of --epochs. The learning rate schedule spans these minutes.
    The last step ends with them, or earlier if a UNet memorises the photos.
    The start of Python, the last validation and the last samples take additional time."""
    batch_size: int | None = flag(None, may_change=True)
    """Photos per forward pass on each device (default: planned)."""
    grad_accum: int = flag(1, may_change=True)
    """Forward passes per optimizer step. The effective batch size is batch size x this x devices."""

    # optimisation
    learning_rate: Annotated[float | None, tyro.conf.arg(aliases=["--lr"])] = None
    """Peak learning rate (default: 1e-4; for a UNet with --config tiny 2e-3, with base or large 5e-4)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon makes the steps of convolutions and matrices orthogonal, and uses AdamW for all other weights."""
    lr_scheduler: LR_SCHEDULERS = "cosine"
    """Schedule of the learning rate. cosine and cosine_warm_restarts end at --lr-min.
    plateau halves the rate, down to --lr-min. linear and the names after it are schedules of diffusers."""
    lr_min: float = 1e-5
    """Lowest learning rate of cosine, cosine_warm_restarts and plateau."""
    lr_warmup_steps: int = 30
    """Number of steps in which the learning rate rises to its peak."""
    weight_decay: float = 1e-2
    """Weight decay, decoupled from the gradient as in AdamW."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradients. Larger gradients are scaled down to it."""
    ema: bool = True
    """Validate, sample and save with an exponential moving average (EMA) of the weights."""
    ema_decay: float = 0.9999
    """Maximum decay of the EMA. Until it is reached, the decay rises with the number of steps.
    The EMA then averages over a fraction of the steps: the last 8 % of 2,000 steps, the last 3 % of 30,000."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Mixed precision. auto means fp16 on CUDA.
    On a CPU with bf16 in hardware, auto times a few steps and selects bf16 or no. Otherwise auto means no."""
    attention: Literal["auto", "fused", "math"] = flag("auto", may_change=True)
    """Attention kernel on a CPU. In bf16, auto times a few steps and selects the faster one. Otherwise it is fused."""
    no_mixed_precision: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Same as --mixed-precision no."""
    seed: int = 42
    """Random seed. All randomness in a step derives from this seed and the number of the step."""

    # intervals in epochs, and outputs
    validate_every: int | None = flag(None, may_change=True)
    """Epochs between validations (default: the smallest number for which validation takes 3 % of the time or less).
    With --epochs or --max-train-steps, the default gives at least ten validations."""
    sample_every: int | None = flag(None, may_change=True)
    """Epochs between samples (default: 10; with --max-train-minutes, a tenth of the run)."""
    checkpoint_every: int | None = flag(None, may_change=True)
    """Epochs between checkpoints (default: 20 for a VAE, 10 for a UNet; with --max-train-minutes, a tenth of the run).
    By default, the script also saves a checkpoint every ten minutes."""
    checkpoint_steps: int | None = flag(None, may_change=True)
    """Optimizer steps between checkpoints, instead of --checkpoint-every."""
    keep_checkpoints: int = flag(3, may_change=True)
    """Number of newest checkpoints to keep (0 keeps all)."""
    resume: str | None = flag(None, may_change=True, in_card=False)
    """Checkpoint to continue from: "latest", or the path of a checkpoint in this --output-dir.
    "latest" starts a new run if there is no checkpoint."""
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", may_change=True, in_card=False)
    """Also send the metrics to this tracker."""

    def path(self, value: str) -> Path:
        """Return a path that the user gave. A relative path starts at --base-dir, and ~ is the home folder."""
        return user_path(self.base_dir, value)

    @property
    def size_px(self) -> tuple[int, int] | None:
        """The (height, width) of --image-size in pixels, or None if it is unset."""
        return parse_size(self.image_size) if self.image_size else None

    @property
    def photo_source(self) -> str | Path:
        """The source of the photos for `load_photos`: a folder as a Path, or "scenes" or a Hub id as a string."""
        return self.dataset_name or (SCENES if self.data_dir == SCENES else self.path(self.data_dir or "."))

    @property
    def init_location(self) -> Path | str | None:
        """The folder of --init-from as a Path, its Hub id as a string, or None."""
        return self.init_from and model_location(self.init_from, self.base_dir, "--init-from")

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.path(self.output_dir)

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
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, value, "give a number above 0")
        if self.learning_rate:
            self.check_learning_rate()
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "give a number from 0 to below 1")
        if self.image_size:
            parse_size(self.image_size)
        if self.dataset_name and self.data_dir:
            raise UserError("--dataset-name and --data-dir exclude each other: give only one of them")
        if self.report_to != "none" and not importlib.util.find_spec(self.report_to):
            raise UserError(f"--report-to {self.report_to} is not installed: pip install {self.report_to}")
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
        return {name: getattr(self, name) for name in self.PLANNED} | length

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
            self.lr_min <= self.learning_rate,
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
        timed = {name: plan.get(name, value) for name, value in self.timed.items() if value == "auto"}
        args = replace(self, **{name: plan.get(name) for name in unset}, **timed)
        args.check_config_file()
        args = replace(args, learning_rate=args.learning_rate or args.LEARNING_RATES.get(args.config, 1e-4))
        args.check_learning_rate()
        return args
