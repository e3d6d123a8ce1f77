"""The flags of the two training scripts: one dataclass a script, what both share in one place.

Parsing needs no torch, so that `--help` and a refused flag answer at once. `parse` checks what can be checked without loading
a photo or a model, and resolves relative paths against `--base-dir`.
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
    """What train_vae.py and train_unet.py have in common."""

    PLANNED: ClassVar[tuple[str, ...]] = ("config", "image_size", "batch_size")
    LEARNING_RATES: ClassVar[dict[str, float]] = {}  # of the presets for which 1e-4 is not best
    CHECKPOINT_EVERY: ClassVar[int] = 10  # epochs
    MUON_SCALE: ClassVar[float] = 30.0  # Muon's learning rate over AdamW's, as it trained the tiny model best

    # photos
    data_dir: Annotated[str, tyro.conf.arg(aliases=["--image-dir"])] = SCENES
    """Folder of photos: prepared, raw Corel, one folder a class, or flat. "scenes" is drawn by this package."""
    dataset_name: str | None = None
    """Hub dataset id, in place of --data-dir."""
    classes: tuple[str, ...] = ()
    """Train on these classes only, by name or number (default: all)."""
    max_train_samples: int | None = None
    """Use at most this many training photos."""
    image_size: str | None = None
    """Pixels: 128, or 96x144 (height x width)."""
    num_workers: int = 0
    """Processes that read ahead. Pixels and latents are decoded once and cached: 0 is fastest on most machines."""

    # where things are
    output_dir: str = "."
    """Folder of the run: the model, metrics.jsonl, plots, pictures, checkpoints."""
    base_dir: str = "."
    """Relative paths start here."""

    # model
    config: str | None = None
    """tiny, base, large, or the path of a diffusers config JSON."""
    gradient_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep no activations between stages but compute them again for the gradients: the same gradients, less memory, slower."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile the model with torch.compile after some steps, and say whether the minutes that this takes will be won back."""
    cuda_graphs: bool = True
    """On one GPU, record the forward and backward pass and replay them where that is faster."""

    # how long, and how many at a time
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only print what a run would be, from the photos, this machine's speed and the minutes."""
    epochs: int | None = None
    """Passes over the training photos."""
    max_train_steps: int | None = None
    """Optimizer steps, in place of --epochs."""
    max_train_minutes: float | None = None
    """Minutes, in place of --epochs: the learning rate runs over them, and the last step ends with them, or sooner where a UNet learns
    the photos by heart. Starting Python and the last validation and pictures are not counted."""
    batch_size: int | None = None
    """Photos a forward pass, on each device."""
    grad_accum: int = 1
    """Forward passes an optimizer step: the effective batch is batch size x this x devices."""

    # optimisation
    learning_rate: Annotated[float | None, tyro.conf.arg(aliases=["--lr"])] = None
    """Peak learning rate (default: 1e-4; for a UNet of --config tiny 2e-3, of base and large 5e-4)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon makes the steps of convolutions and matrices orthogonal; the rest stays with AdamW."""
    lr_scheduler: LR_SCHEDULERS = "cosine"
    """Course of the learning rate: the first two end at --lr-min, plateau halves down to it; from linear on, diffusers' own."""
    lr_min: float = 1e-5
    """Lowest learning rate of cosine, cosine_warm_restarts and plateau."""
    lr_warmup_steps: int = 30
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: bool = True
    """Validate, sample and save with an exponential moving average of the weights."""
    ema_decay: float = 0.9999
    """Ceiling of the average's decay. Before, it rises with the steps, and the average is over a share of them: 8 % of the last 2,000, 3 %
    of 30,000."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto is fp16 on CUDA; where a CPU has bf16 in hardware, that or no, as a few timed steps decide; else no."""
    attention: Literal["auto", "fused", "math"] = "auto"
    """Kernel of attention on a CPU. auto: in bf16, as a few timed steps decide; else fused."""
    no_mixed_precision: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same as --mixed-precision no."""
    seed: int = 42
    """Everything random in a step derives from this and the step's number."""

    # what is measured and written when, in epochs
    validate_every: int | None = None
    """Epochs between validations (default: as few as keep them at 3 % of the time; ten at least in a run that counts epochs or steps)."""
    sample_every: int | None = None
    """Epochs between pictures (default: 10; a run of minutes has them ten times)."""
    checkpoint_every: int | None = None
    """Epochs between checkpoints (default: 20 for a VAE, 10 for a UNet, a tenth of a run of minutes; after ten minutes in any case)."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep (0 keeps all)."""
    resume: str | None = None
    """"latest", or the path of a checkpoint of this --output-dir. "latest" starts afresh where there is none."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also send the metrics to this tracker."""

    def path(self, value: str) -> Path:
        """A path as the user gave it, from --base-dir."""
        return Path(self.base_dir) / value

    @property
    def size_px(self) -> tuple[int, int] | None:
        """(height, width) of --image-size, None when not given."""
        return parse_size(self.image_size) if self.image_size else None

    @property
    def photo_source(self) -> str | Path:
        """What load_photos takes: a folder as a Path, "scenes" or a Hub id as a string."""
        return self.dataset_name or (SCENES if self.data_dir == SCENES else self.path(self.data_dir))

    @property
    def run_dir(self) -> Path:
        return self.path(self.output_dir)

    def settings(self) -> dict:
        """The flags that an interrupted run and its continuation must share, as JSON values.

        Not those that say how long, how often or where: photos, VAE and size are compared by what they are, not by name.
        """
        where = {"data_dir", "dataset_name", "image_size", "vae_checkpoint", "output_dir", "base_dir", "push_to_hub", "hub_model_id"}
        when = {"epochs", "max_train_steps", "max_train_minutes", "validate_every", "sample_every", "checkpoint_every", "evaluate_every"}
        kept = {"keep_checkpoints", "resume", "report_to", "plan"}
        how = {
            "batch_size",
            "grad_accum",
            "num_workers",
            "no_mixed_precision",
            "gradient_checkpointing",
            "compile",
            "cuda_graphs",
            "attention",
            "config",
        }  # the global batch is compared, the config's content
        stopping = {"early_stopping_patience", "early_stopping_delta", "oscillation_window", "oscillation_threshold"}
        return {name: value for name, value in asdict(self).items() if name not in where | when | kept | how | stopping}

    def command(self, script: str) -> str:
        """The command line that gives these settings, without folders of the user's machine: it goes into model cards."""
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
        """Refuses values that no run can take."""
        counts = ("grad_accum", "epochs", "batch_size", "max_train_steps", "max_train_samples")
        for name in (*counts, "validate_every", "sample_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more")
        minutes = self.max_train_minutes
        require(minutes is None or 0 < minutes < math.inf, "max_train_minutes", minutes, "give a number above 0")
        given = [f"--{name.replace('_', '-')}" for name, value in self.length.items() if value]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other: give one of them")
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
            raise UserError("--dataset-name and --data-dir exclude each other: give one of them")
        if self.report_to != "none" and not importlib.util.find_spec(self.report_to):
            raise UserError(f"--report-to {self.report_to} is not installed: pip install {self.report_to}")
        if self.no_mixed_precision:
            require(self.mixed_precision in ("auto", "no"), "mixed_precision", self.mixed_precision, "leave out --no-mixed-precision")
            self.mixed_precision = "no"
        if not self.dataset_name and self.data_dir != SCENES and not self.path(self.data_dir).is_dir():
            raise UserError(f"--data-dir {self.path(self.data_dir)} is no folder: check the path (relative ones start at --base-dir)")
        if self.config and self.config.endswith(".json"):
            self.config = str(self.path(self.config))
            self.check_config_file()
        elif self.config not in (None, "tiny", "base", "large"):
            raise UserError(f"--config {self.config} is unknown: give tiny, base, large or a JSON file")

    @property
    def length(self) -> dict:
        """The flags that say how long a run is; one of them is given, or none."""
        return {name: getattr(self, name) for name in ("epochs", "max_train_steps", "max_train_minutes")}

    @property
    def planned(self) -> dict:
        """The flags that a plan decides where they are left open; of the lengths, one is given or planned."""
        length = {name: value for name, value in self.length.items() if value} or {"max_train_minutes": None}
        return {name: getattr(self, name) for name in self.PLANNED} | length

    @property
    def timed(self) -> dict:
        """The flags that timed steps decide where they are "auto"."""
        return {"mixed_precision": self.mixed_precision, "attention": self.attention}

    def check_config_file(self) -> None:
        there = not self.config.endswith(".json") or Path(self.config).is_file()
        require(there, "config", self.config, "no such file: give tiny, base, large or a JSON file")

    def check_learning_rate(self) -> None:
        require(self.lr_min <= self.learning_rate, "lr_min", self.lr_min, f"give at most --learning-rate {self.learning_rate:g}")

    def fill(self, plan: dict) -> None:
        """Sets the flags that are open to those of the plan, and then those that follow from them."""
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
    """Train an AutoencoderKL from scratch. What is left open of --config, --image-size, --batch-size, the length and the weights of the
    loss is planned."""

    PLANNED: ClassVar[tuple[str, ...]] = (*TrainingArguments.PLANNED, "perceptual_weight", "adversarial_weight", "kl_weight")
    CHECKPOINT_EVERY: ClassVar[int] = 20

    output_dir: str = "vae_models"
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon makes the steps of convolutions and matrices orthogonal; the rest stays with AdamW."""

    # model
    latent_dim: int | None = None
    """Latent channels (default: the config's)."""
    downsample: Literal[4, 8, 16] | None = None
    """Pixels a latent position, in each direction (default: the config's)."""

    # photos, as they vary
    crop_chance: float = 0.3
    """Share of photos seen as a random crop at a random scale, of the photo at up to two and a half times the training size."""
    colour_jitter: float = 0.05
    """Brightness and contrast vary by up to this share."""

    # loss
    reconstruction: Literal["l1", "mse"] = "l1"
    """Distance between photo and reconstruction, averaged over values."""
    perceptual: bool = True
    """Add the distance in a frozen network's features."""
    perceptual_weight: float | None = None
    """Weight of that term (default: 0.3; 1 in a long run of a tiny model)."""
    perceptual_network: Literal["efficientnet-lite0", "vgg16"] = "efficientnet-lite0"
    """vgg16 needs torchvision and its weights."""
    adversarial_weight: float | None = None
    """Weight of a patch discriminator's verdict, in units of the reconstruction's gradient at the last layer (0: no discriminator; default:
    0.3 in a long run of a tiny model, else 0)."""
    adversarial_start: float = 0.4
    """Share of the run after which the verdict counts; the discriminator learns from a tenth of the run earlier."""
    kl_weight: float | None = None
    """Final weight of the KL divergence in nats per photo (default: 0.4 / pixels, which is 1e-4 at 64 px; half of it in a long run of a
    tiny model)."""
    kl_warmup: int = 10
    """Epochs over which the KL weight rises to its value; a third of the run at most."""
    kl_target: float | None = None
    """Steer the KL weight so that the KL reaches this many nats per photo (from the first step: --kl-warmup is not used)."""

    def check(self) -> None:
        super().check()
        for name in ("kl_weight", "perceptual_weight", "adversarial_weight", "kl_warmup"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "give 0 or more")
        start = self.adversarial_start
        require(0 <= start < 1, "adversarial_start", start, "give a share of the run from 0 to below 1: from 1 on it would never count")
        require(0 <= self.crop_chance <= 1, "crop_chance", self.crop_chance, "give a share from 0 to 1")
        require(0 <= self.colour_jitter < 1, "colour_jitter", self.colour_jitter, "give a share from 0 to below 1")
        require(self.latent_dim is None or self.latent_dim >= 1, "latent_dim", self.latent_dim, "give 1 or more")
        require(self.kl_target is None or self.kl_target > 0, "kl_target", self.kl_target, "give a number above 0")

    def fill(self, plan: dict) -> None:
        super().fill(plan)
        for name, value in {"perceptual_weight": 0.3, "adversarial_weight": 0.0, "kl_weight": 0.4 / math.prod(self.size_px)}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


@dataclass(kw_only=True)
class UNetArguments(TrainingArguments):
    """Train a UNet2DModel from scratch in a VAE's latent space, and write the pipeline. What is left open of --config, --batch-size,
    --views and the length is planned."""

    PLANNED: ClassVar[tuple[str, ...]] = ("config", "batch_size", "views")  # the size is the VAE's
    LEARNING_RATES: ClassVar[dict[str, float]] = {"tiny": 2e-3, "base": 5e-4, "large": 5e-4}
    MUON_SCALE: ClassVar[float] = 2.0

    output_dir: str = "diffusion_models"

    # model
    vae_checkpoint: str = "vae_models"
    """Folder that train_vae.py wrote, or the Hub id of an AutoencoderKL."""
    unconditional: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave the class labels out."""
    dropout: float | None = None
    """Share of inner values dropped in each pass of training (default: the config's)."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null label, which guidance leads away from: above 0 where there are classes."""

    # photos, as they vary
    views: int | None = None
    """Crops of each photo, brightness and contrast varied, to train on as well; the UNet is told of the change and draws none
    (default: planned, 16 where the run sees each photo so often that it would learn it by heart, else 0)."""
    view_chance: float = 0.5
    """Share of training pictures that are such views."""

    # loss
    align_weight: float = 0.25
    """Weight of how far the UNet's inner features are from a frozen network's of the clean photo (0: left to itself)."""

    # diffusion
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule over the 1000 timesteps."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """What the UNet predicts."""
    zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the last timestep be pure noise (Lin et al. 2023); not with --prediction-type epsilon."""
    min_snr_gamma: float = 5.0
    """Weight the loss by min(SNR, gamma), with --zero-terminal-snr by that plus 1: it favours the noise levels at which pictures take shape
    (0: every timestep alike)."""
    timesteps: Literal["uniform", "log-normal"] = "uniform"
    """How training draws timesteps; log-normal prefers middling noise."""
    log_normal: tuple[float, float] = (0.3, 1.2)
    """Mean and spread of the log noise level of --timesteps log-normal; latents have unit variance."""

    # samples, judged while it trains
    evaluate_every: int = 0
    """Epochs between evaluations of a few samples: KID and copies, into metrics.jsonl and the plot (0: none)."""

    # early stopping, on the losses at fixed noise and timesteps
    early_stopping_patience: int | None = None
    """Validations without a lower loss before the run stops: of seen photos while the overfitting gauge is healthy, then of held-out ones
    (0: never stops early; default: 30; a run of minutes stops once a tenth of them gave nothing to publish)."""
    early_stopping_delta: float = 1e-5
    """A lower loss is lower by at least this."""
    oscillation_window: int | None = None
    """Validations in which the loss may swing without falling before it stops (0: not looked at; default: 10, of a run of minutes 0)."""
    oscillation_threshold: float = 0.0005
    """A lowest loss that falls by less than this from one half of the window to the other does not count as falling."""

    # the Hub
    push_to_hub: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Push the pipeline when training ends."""
    hub_model_id: str | None = None
    """user/name on the Hub."""

    def check(self) -> None:
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
        require(0 <= self.view_chance <= 1, "view_chance", self.view_chance, "give a share from 0 to 1")
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "give a share from 0 to below 1")
        require(self.log_normal[1] > 0, "log_normal", self.log_normal, "give a spread above 0")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise UserError("--zero-terminal-snr: no picture can be told from the noise in pure noise: give --prediction-type v_prediction")
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push-to-hub needs --hub-model-id user/name")
        if self.hub_model_id:
            check_repo_id(self.hub_model_id, "--hub-model-id")
        _ = self.vae_location

    def fill(self, plan: dict) -> None:
        super().fill(plan)
        for name, validations, of_minutes in (("early_stopping_patience", 30, None), ("oscillation_window", 10, 0)):
            if getattr(self, name) is None:
                setattr(self, name, of_minutes if self.max_train_minutes else validations)

    @property
    def vae_location(self) -> Path | str:
        """The VAE's folder as a Path, or its Hub id."""
        return model_location(self.vae_checkpoint, Path(self.base_dir), "--vae-checkpoint")


def parse(kind: type[TrainingArguments]) -> TrainingArguments:
    """The command line as checked arguments of `kind`. Raises UserError on a value that no run can take."""
    arguments = tyro.cli(kind, description=kind.__doc__)
    arguments.check()
    return arguments


def require(holds: bool, name: str, value: object, way_out: str) -> None:
    """Refuses a flag's value."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value}: {way_out}")


def parse_size(text: str) -> tuple[int, int]:
    """ "128" or "96x144" -> (height, width) in pixels."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.lower())
    if not match or not int(match[1]) or (match[2] and not int(match[2])):
        raise UserError(f"--image-size {text}: give pixels as 128, or as 96x144 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def check_repo_id(repo_id: str, flag: str) -> None:
    """Refuses what is no `user/name` before anything is built or sent."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"{flag} {repo_id}: give user/name")


def model_location(given: str, base_dir: Path, flag: str) -> Path | str:
    """A model's folder as a Path, or its Hub id as a string.

    A path to a file in a model's folder (`vae_models/best_model.pt` of older scripts) stands for that folder. A name that
    begins with one of the default output folders is never looked for on the Hub.
    """
    folder = base_dir / given
    if folder.is_dir():
        return folder
    is_file = Path(given).suffix in {".pt", ".pth", ".safetensors", ".json"}
    if is_file and folder.parent.is_dir():
        return folder.parent
    ours = Path(given).parts[0] in {"vae_models", "diffusion_models"} or folder.parent.is_dir()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not is_file and not ours:
        return given
    trainer = "train_vae.py" if flag == "--vae-checkpoint" else "train_unet.py"
    raise UserError(f"{flag} {folder} is no folder: train with {trainer} first, or give its --output-dir or a Hub id")
