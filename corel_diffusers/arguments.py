"""The flags of the two training scripts: one dataclass per script, and a base class with the flags of both.

This module does not import torch, so `--help` and errors in flags appear at once. `parse` checks everything that can be
checked without loading a photo or a model. Relative paths start at `--base-dir`.
"""

import importlib.util
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from corel_diffusers.files import UserError

SCENES = "scenes"
LR_SCHEDULERS = Literal[
    "cosine", "cosine_warm_restarts", "plateau", "none",
    "linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
]  # fmt: skip


@dataclass(kw_only=True)
class TrainingArguments:
    """The flags that train_vae.py and train_unet.py share."""

    PLANNED: ClassVar[tuple[str, ...]] = ("config", "image_size", "batch_size")
    LEARNING_RATES: ClassVar[dict[str, float]] = {}  # for the presets for which 1e-4 is not the best value
    CHECKPOINT_EVERY: ClassVar[int] = 10  # default of --checkpoint-every, epochs
    MUON_SCALE: ClassVar[float] = 30.0  # Muon's learning rate / AdamW's; the best measured value for tiny

    # photos
    data_dir: Annotated[str, tyro.conf.arg(aliases=["--image-dir"])] = SCENES
    """Folder of photos: prepared, raw Corel, one folder per class, or flat. "scenes": this package draws the photos."""
    dataset_name: str | None = None
    """Id of a Hub dataset, instead of --data-dir."""
    classes: tuple[str, ...] = ()
    """Train only on these classes, given by name or number (default: all)."""
    max_train_samples: int | None = None
    """Use at most this many training photos."""
    image_size: str | None = None
    """Image size in pixels: 128, or 96x144 (height x width)."""
    num_workers: int = 0
    """Number of processes that load batches in advance.
    Pixels and latents are computed once and cached, so 0 is fastest on most machines."""

    # folders
    output_dir: str = "."
    """Folder of the run: the model, metrics.jsonl, plots, samples, checkpoints."""
    base_dir: str = "."
    """Folder at which relative paths start."""

    # model
    config: str | None = None
    """Model size: tiny, base, large, or the path of a diffusers config JSON."""
    gradient_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Recompute activations in the backward pass instead of storing them.
    The gradients are the same. Training needs less memory and is slower."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile the model with torch.compile after the first steps.
    Compiling takes minutes. The script prints whether the run saves more time than that."""
    cuda_graphs: bool = True
    """On one GPU, record the forward and backward pass as CUDA graphs, and replay them if that is faster."""

    # length and batch size
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the plan of the run and exit. The plan depends on the photos, the speed of this machine and the minutes."""
    epochs: int | None = None
    """Number of epochs. One epoch is one pass over the training photos."""
    max_train_steps: int | None = None
    """Number of optimizer steps, instead of --epochs."""
    max_train_minutes: float | None = None
    """Length of the run in minutes, instead of --epochs. The learning rate schedule spans these minutes.
    The last step ends with them, or earlier if a UNet memorises the photos.
    The start of Python, the last validation and the last samples take additional time."""
    batch_size: int | None = None
    """Photos per forward pass on each device (default: planned)."""
    grad_accum: int = 1
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
    attention: Literal["auto", "fused", "math"] = "auto"
    """Attention kernel on a CPU. In bf16, auto times a few steps and selects the faster one. Otherwise it is fused."""
    no_mixed_precision: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Same as --mixed-precision no."""
    seed: int = 42
    """Random seed. All randomness in a step derives from this seed and the number of the step."""

    # intervals in epochs, and outputs
    validate_every: int | None = None
    """Epochs between validations (default: the smallest number for which validation takes 3 % of the time or less).
    With --epochs or --max-train-steps, the default gives at least ten validations."""
    sample_every: int | None = None
    """Epochs between samples (default: 10; with --max-train-minutes, a tenth of the run)."""
    checkpoint_every: int | None = None
    """Epochs between checkpoints (default: 20 for a VAE, 10 for a UNet; with --max-train-minutes, a tenth of the run).
    By default, the script also saves a checkpoint every ten minutes."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep (0 keeps all)."""
    resume: str | None = None
    """Checkpoint to continue from: "latest", or the path of a checkpoint in this --output-dir.
    "latest" starts a new run if there is no checkpoint."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also send the metrics to this tracker."""

    def path(self, value: str) -> Path:
        """Return a path that the user gave. A relative path starts at --base-dir."""
        return Path(self.base_dir) / value

    @property
    def size_px(self) -> tuple[int, int] | None:
        """The (height, width) of --image-size in pixels, or None if it is unset."""
        return parse_size(self.image_size) if self.image_size else None

    @property
    def photo_source(self) -> str | Path:
        """The source of the photos for `load_photos`: a folder as a Path, or "scenes" or a Hub id as a string."""
        return self.dataset_name or (SCENES if self.data_dir == SCENES else self.path(self.data_dir))

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.path(self.output_dir)

    def settings(self) -> dict:
        """Return the flags that must not change when an interrupted run is resumed, as JSON values.

        The length of a run, its intervals and its folders may change. The photos, the VAE and the image size are left
        out because the run compares their contents instead of their names.
        """
        location = {
            "data_dir",
            "dataset_name",
            "image_size",
            "vae_checkpoint",
            "output_dir",
            "base_dir",
            "push_to_hub",
            "hub_model_id",
        }
        length_and_intervals = {
            "epochs",
            "max_train_steps",
            "max_train_minutes",
            "validate_every",
            "sample_every",
            "checkpoint_every",
            "evaluate_every",
        }
        bookkeeping = {"keep_checkpoints", "resume", "report_to", "plan"}
        compute = {
            "batch_size",
            "grad_accum",
            "num_workers",
            "no_mixed_precision",
            "gradient_checkpointing",
            "compile",
            "cuda_graphs",
            "attention",
            "config",
        }  # the run compares the global batch and the content of the config instead
        stopping = {"early_stopping_patience", "early_stopping_delta", "oscillation_window", "oscillation_threshold"}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in location | length_and_intervals | bookkeeping | compute | stopping
        }

    def command(self, script: str) -> str:
        """Return the command line that gives these settings.

        Absolute paths are shortened to their last part, because the command line is written to public model cards.
        """
        words = ["python", script]
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in {"base_dir", "resume", "report_to", "num_workers", "plan"}:
                continue
            flag = "--" + field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
                continue
            values = value if isinstance(value, tuple) else (value,)
            shown = [Path(str(v)).name if Path(str(v)).is_absolute() else str(v) for v in values]
            words += [flag, *(f'"{v}"' if " " in v else v for v in shown)]
        return " ".join(words)

    def check(self) -> None:
        """Check the values of the flags.

        Raises:
            UserError: a value that no run can use.
        """
        counts = ("grad_accum", "epochs", "batch_size", "max_train_steps", "max_train_samples")
        for name in (*counts, "validate_every", "sample_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more")
        minutes = self.max_train_minutes
        require(minutes is None or 0 < minutes < math.inf, "max_train_minutes", minutes, "give a number above 0")
        given = [f"--{name.replace('_', '-')}" for name, value in self.length.items() if value]
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
        if self.dataset_name and self.data_dir != SCENES:
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
            self.mixed_precision = "no"
        if not self.dataset_name and self.data_dir != SCENES and not self.path(self.data_dir).is_dir():
            raise UserError(
                f"--data-dir {self.path(self.data_dir)} is not a folder: "
                "check the path (relative paths start at --base-dir)"
            )
        if self.config and self.config.endswith(".json"):
            self.config = str(self.path(self.config))
            self.check_config_file()
        elif self.config not in (None, "tiny", "base", "large"):
            raise UserError(f"--config {self.config} is unknown: give tiny, base, large or a JSON file")

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
        exists = not self.config.endswith(".json") or Path(self.config).is_file()
        require(exists, "config", self.config, "no such file: give tiny, base, large or a JSON file")

    def check_learning_rate(self) -> None:
        """Raise UserError if --lr-min is higher than --learning-rate."""
        require(
            self.lr_min <= self.learning_rate,
            "lr_min",
            self.lr_min,
            f"give at most --learning-rate {self.learning_rate:g}",
        )

    def fill(self, plan: dict) -> None:
        """Set the unset flags to the values of the plan, and then the flags whose defaults depend on them."""
        for name in [*self.PLANNED, *(() if any(self.length.values()) else self.length)]:
            if getattr(self, name) is None:
                setattr(self, name, plan.get(name))
        for name, value in self.timed.items():
            if value == "auto":
                setattr(self, name, plan.get(name, value))
        self.check_config_file()
        self.learning_rate = self.learning_rate or self.LEARNING_RATES.get(self.config, 1e-4)
        self.check_learning_rate()


@dataclass(kw_only=True)
class VAEArguments(TrainingArguments):
    """Train an AutoencoderKL from scratch.
    These options are planned if you leave them unset: --config, --image-size, --batch-size, the length of the run and
    the weights of the loss."""

    PLANNED: ClassVar[tuple[str, ...]] = (
        *TrainingArguments.PLANNED,
        "perceptual_weight",
        "adversarial_weight",
        "kl_weight",
    )
    CHECKPOINT_EVERY: ClassVar[int] = 20

    output_dir: str = "vae_models"
    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer. muon makes the steps of convolutions and matrices orthogonal, and uses AdamW for all other weights."""

    # model
    latent_dim: int | None = None
    """Number of latent channels (default: the config's)."""
    downsample: Literal[4, 8, 16] | None = None
    """Pixels per latent position, in each direction (default: the config's)."""

    # augmentation
    crop_chance: float = 0.3
    """Fraction of training photos that are replaced by a random crop at a random scale.
    The crop is cut from the photo at up to two and a half times the training size."""
    colour_jitter: float = 0.05
    """Colour jitter: brightness and contrast change by up to this fraction."""

    # loss
    reconstruction: Literal["l1", "mse"] = "l1"
    """Distance between photo and reconstruction, averaged over all values."""
    perceptual: bool = True
    """Add a perceptual loss: the distance in the features of a frozen network."""
    perceptual_weight: float | None = None
    """Weight of the perceptual loss (default: 0.3; 1 in a long run of a tiny model)."""
    perceptual_network: Literal["efficientnet-lite0", "vgg16"] = "efficientnet-lite0"
    """Frozen network of the perceptual loss. vgg16 needs torchvision and its weights."""
    adversarial_weight: float | None = None
    """Weight of the adversarial loss of a patch discriminator, relative to the gradient of the reconstruction loss at
    the last layer (0: no discriminator; default: 0.3 in a long run of a tiny model, otherwise 0)."""
    adversarial_start: float = 0.4
    """Fraction of the run after which the adversarial loss starts.
    The discriminator starts to learn a tenth of the run earlier."""
    kl_weight: float | None = None
    """Final weight of the KL divergence in nats per photo (default: 0.4 / pixels, which is 1e-4 at 64 px; half of
    that in a long run of a tiny model)."""
    kl_warmup: int = 10
    """Epochs in which the KL weight rises to its final value; at most a third of the run."""
    kl_target: float | None = None
    """Adjust the KL weight so that the KL divergence reaches this many nats per photo.
    The adjustment begins at the first step, and --kl-warmup is not used."""

    def check(self) -> None:
        """See TrainingArguments.check."""
        super().check()
        for name in ("kl_weight", "perceptual_weight", "adversarial_weight", "kl_warmup"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "give 0 or more")
        start = self.adversarial_start
        require(
            0 <= start < 1,
            "adversarial_start",
            start,
            "give a fraction of the run from 0 to below 1: from 1 on, the adversarial loss would never start",
        )
        require(0 <= self.crop_chance <= 1, "crop_chance", self.crop_chance, "give a fraction from 0 to 1")
        require(0 <= self.colour_jitter < 1, "colour_jitter", self.colour_jitter, "give a fraction from 0 to below 1")
        require(self.latent_dim is None or self.latent_dim >= 1, "latent_dim", self.latent_dim, "give 1 or more")
        require(self.kl_target is None or self.kl_target > 0, "kl_target", self.kl_target, "give a number above 0")

    def fill(self, plan: dict) -> None:
        """See TrainingArguments.fill. Weights of the loss that the plan does not contain get their default values."""
        super().fill(plan)
        for name, value in {
            "perceptual_weight": 0.3,
            "adversarial_weight": 0.0,
            "kl_weight": 0.4 / math.prod(self.size_px),
        }.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass(kw_only=True)
class UNetArguments(TrainingArguments):
    """Train a UNet2DModel from scratch in the latent space of a VAE, and save the pipeline.
    These options are planned if you leave them unset: --config, --batch-size, --views and the length of the run."""

    PLANNED: ClassVar[tuple[str, ...]] = ("config", "batch_size", "views")  # the image size is the VAE's
    LEARNING_RATES: ClassVar[dict[str, float]] = {"tiny": 2e-3, "base": 5e-4, "large": 5e-4}
    MUON_SCALE: ClassVar[float] = 2.0

    output_dir: str = "diffusion_models"

    # model
    vae_checkpoint: str = "vae_models"
    """Folder of a VAE that train_vae.py trained, or the Hub id of an AutoencoderKL."""
    unconditional: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train without class labels."""
    dropout: float | None = None
    """Dropout: fraction of inner values set to zero in each forward pass of training (default: the config's)."""
    label_dropout: float = 0.1
    """Fraction of labels replaced by the null label. It must be above 0 if there are classes:
    guidance leads away from the prediction for the null label."""

    # augmentation
    views: int | None = None
    """Number of augmented crops per photo, with colour jitter, to train on in addition to the photo.
    The UNet is conditioned on the crop parameters, so its samples are not cropped.
    Default: planned, 16 if the run sees each photo so often that it would memorise it, otherwise 0."""
    view_chance: float = 0.5
    """Fraction of training images that are augmented crops."""

    # loss
    align_weight: float = 0.25
    """Weight of the alignment loss (0: off).
    This loss pulls inner features of the UNet towards a frozen network's features of the clean photo."""

    # diffusion
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule over the 1000 timesteps."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """What the UNet predicts: the noise, the velocity or the clean latents."""
    zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make the last timestep pure noise (Lin et al. 2023). Not possible with --prediction-type epsilon."""
    min_snr_gamma: float = 5.0
    """Weight the loss by min(SNR, gamma), or by min(SNR, gamma) + 1 with --zero-terminal-snr (0: equal weights).
    This favours the noise levels at which images take shape."""
    timesteps: Literal["uniform", "log-normal"] = "uniform"
    """How timesteps are drawn in training. log-normal prefers medium noise levels."""
    log_normal: tuple[float, float] = (0.3, 1.2)
    """Mean and standard deviation of the log noise level for --timesteps log-normal. Latents have unit variance."""

    # evaluation during training
    evaluate_every: int = 0
    """Epochs between evaluations of a few samples (0: none).
    An evaluation adds KID and copies to metrics.jsonl and the plot."""

    # early stopping, on the losses at fixed noise and timesteps
    early_stopping_patience: int | None = None
    """Stop after this many validations without a lower loss (0: never stop early; default: 30).
    The loss is that of training photos while the overfitting gauge is healthy, and that of held-out photos otherwise.
    The default with --max-train-minutes is to stop after a tenth of the minutes without a model to save as best."""
    early_stopping_delta: float = 1e-5
    """A loss counts as lower only if it is lower by at least this much."""
    oscillation_window: int | None = None
    """Stop if the loss oscillates without falling in this many validations.
    0 turns the check off. Default: 10, or 0 with --max-train-minutes."""
    oscillation_threshold: float = 0.0005
    """The oscillation check compares the minimum loss in the second half of the window with that in the first half.
    The loss counts as falling if the second minimum is lower by more than this."""

    # the Hub
    push_to_hub: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Push the pipeline to the Hub when training ends."""
    hub_model_id: str | None = None
    """Id of the repository on the Hub: user/name."""

    def check(self) -> None:
        """See TrainingArguments.check."""
        super().check()
        require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "give a number from 0 to below 1")
        for name in (
            "early_stopping_patience",
            "early_stopping_delta",
            "oscillation_window",
            "oscillation_threshold",
            "evaluate_every",
            "min_snr_gamma",
            "views",
            "align_weight",
        ):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "give 0 or more")
        require(0 <= self.view_chance <= 1, "view_chance", self.view_chance, "give a fraction from 0 to 1")
        require(
            self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "give a fraction from 0 to below 1"
        )
        require(self.log_normal[1] > 0, "log_normal", self.log_normal, "give a standard deviation above 0")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise UserError(
                "--zero-terminal-snr: with --prediction-type epsilon the image cannot be computed from pure noise: "
                "give --prediction-type v_prediction"
            )
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push-to-hub needs --hub-model-id user/name")
        if self.hub_model_id:
            check_repo_id(self.hub_model_id, "--hub-model-id")
        _ = self.vae_location

    def fill(self, plan: dict) -> None:
        """See TrainingArguments.fill. The defaults of early stopping are different with --max-train-minutes."""
        super().fill(plan)
        for name, default, default_with_minutes in (
            ("early_stopping_patience", 30, None),
            ("oscillation_window", 10, 0),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default_with_minutes if self.max_train_minutes else default)

    @property
    def vae_location(self) -> Path | str:
        """The folder of the VAE as a Path, or its Hub id as a string."""
        return model_location(self.vae_checkpoint, Path(self.base_dir), "--vae-checkpoint")


def parse(kind: type[TrainingArguments]) -> TrainingArguments:
    """Parse the command line and return checked arguments of the class `kind`.

    Raises:
        UserError: a value that no run can use.
    """
    arguments = tyro.cli(kind, description=kind.__doc__)
    arguments.check()
    return arguments


def require(condition: bool, name: str, value: object, hint: str) -> None:
    """Raise UserError for the value of a flag if the condition is false. `hint` tells the user what to give instead."""
    if not condition:
        raise UserError(f"--{name.replace('_', '-')} {value}: {hint}")


def parse_size(text: str) -> tuple[int, int]:
    """Convert "128" or "96x144" to (height, width) in pixels. Raise UserError for any other text."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.lower())
    if not match or not int(match[1]) or (match[2] and not int(match[2])):
        raise UserError(f"--image-size {text}: give pixels as 128, or as 96x144 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def check_repo_id(repo_id: str, flag: str) -> None:
    """Raise UserError if the repository id is not `user/name`, before anything is built or sent."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"{flag} {repo_id}: give user/name")


def model_location(location: str, base_dir: Path, flag: str) -> Path | str:
    """Return the folder of a model as a Path, or its Hub id as a string.

    The path of a file in the folder of a model means that folder: users of older scripts give
    `vae_models/best_model.pt`. A name that begins with one of the default output folders is never a Hub id.

    Raises:
        UserError: there is no such folder, and the name cannot be a Hub id.
    """
    folder = base_dir / location
    if folder.is_dir():
        return folder
    is_file_name = Path(location).suffix in {".pt", ".pth", ".safetensors", ".json"}
    if is_file_name and folder.parent.is_dir():
        return folder.parent
    is_local = Path(location).parts[0] in {"vae_models", "diffusion_models"} or folder.parent.is_dir()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", location) and not is_file_name and not is_local:
        return location
    trainer = "train_vae.py" if flag == "--vae-checkpoint" else "train_unet.py"
    raise UserError(
        f"{flag} {folder} is not a folder: train with {trainer} first, or give its --output-dir or a Hub id"
    )
