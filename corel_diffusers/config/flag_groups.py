"""The groups of flags that both training scripts share: `--help` shows one box per group."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from corel_diffusers.config.checks import flag

# for flags whose value is None by default: their text says what that means
SHOWN_IN_TEXT = tyro.conf.arg(help_behavior_hint="")
OUR_LR_SCHEDULES = ("cosine", "cosine_warm_restarts", "plateau", "none")  # see training/learning_rate.py
TRACKERS = ("tensorboard", "wandb", "trackio")
LR_SCHEDULERS = Literal[
    *OUR_LR_SCHEDULES,
    *("linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),  # of diffusers
]


@dataclass(kw_only=True, frozen=True)
class PhotoFlags:
    """Which photos to train on, and at which size."""

    data_dir: Annotated[str | None, tyro.conf.arg(aliases=["--image-dir"], help_behavior_hint="")] = flag(
        None, may_change=True
    )
    """Folder of photos, in any layout of docs/data.md. "scenes": this package draws the photos."""
    dataset_name: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Id of a Hub dataset, instead of --data-dir."""
    dataset_config_name: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Configuration of the Hub dataset (default: its only one, or the one named default).
    --dataset-name user/name:config means the same."""
    classes: Annotated[tuple[str, ...], SHOWN_IN_TEXT] = ()
    """Train only on these classes, given by name or number (default: all)."""
    max_train_samples: Annotated[int | None, SHOWN_IN_TEXT] = None
    """Use at most this many training photos (default: all)."""
    image_size: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Image size in pixels: 128, or 96x144 (height x width) (default: planned; for a UNet, the size of the VAE)."""
    aspect_buckets: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train on a few image sizes with about the area of --image-size, so that photos of every shape keep their frame.
    Each photo has the size that cuts off the least, and each batch has one size.
    Without this flag, the centre of each photo is cut to the shape of --image-size."""


@dataclass(kw_only=True, frozen=True)
class LengthFlags:
    """How long to train: give one of minutes, epochs and steps, or none of them, and the length is planned."""

    max_train_minutes: Annotated[float | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Length of the run in minutes, instead of --epochs. The learning rate schedule spans these minutes.
    The last step ends with them, or earlier if a UNet memorises the photos.
    The start of Python, the last validation and the last samples take additional time."""
    epochs: Annotated[int | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Number of epochs. One epoch is one pass over the training photos."""
    max_train_steps: Annotated[int | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Number of optimizer steps, instead of --epochs."""
    batch_size: Annotated[int | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Photos per forward pass on each device (default: planned)."""
    grad_accum: int = flag(1, may_change=True)
    """Forward passes per optimizer step. The effective batch size is batch size x this x devices."""
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True, in_card=False)
    """Print the plan of the run and exit. The plan depends on the photos, the speed of this machine and the minutes."""


@dataclass(kw_only=True, frozen=True)
class OutputFlags:
    """Where the run is saved, and how it is continued."""

    output_dir: str = flag(".", may_change=True)
    """Folder of the run: the model, metrics.jsonl, plots, samples, checkpoints."""
    resume: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True, in_card=False)
    """Checkpoint to continue from: "latest", or the path of a checkpoint in this --output-dir.
    "latest" starts a new run if there is no checkpoint. By default, the run is new."""
    config_file: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True, in_card=False)
    """YAML or JSON file with flags, as lines `image-size: 64`, or the run.json of a run.
    Flags on the command line have precedence."""
    base_dir: str = flag(".", may_change=True, in_card=False)
    """Folder at which relative paths start."""
    keep_checkpoints: int = flag(3, may_change=True)
    """Number of newest checkpoints to keep (0 keeps all)."""
    report_to: Literal["none", *TRACKERS, "all"] = flag("none", may_change=True, in_card=False)
    """Also send flags, metrics and images to this tracker, or to all of them that are installed."""


@dataclass(kw_only=True, frozen=True)
class IntervalFlags:
    """How often the run is validated, shown and saved."""

    validate_every: Annotated[int | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Epochs between validations (default: the smallest number for which validation takes 3 % of the time or less).
    With --epochs or --max-train-steps, the default gives at least ten validations."""
    sample_every: Annotated[int | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Epochs between samples (default: 10; with --max-train-minutes, a tenth of the run)."""
    checkpoint_every: Annotated[int | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Epochs between checkpoints (default: 20 for a VAE, 10 for a UNet; with --max-train-minutes, a tenth of the run).
    By default, the script also saves a checkpoint every ten minutes."""
    checkpoint_steps: Annotated[int | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Optimizer steps between checkpoints, instead of --checkpoint-every."""


@dataclass(kw_only=True, frozen=True)
class ModelFlags:
    """What is trained."""

    config: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Model size: tiny, base, large, or the path of a diffusers config JSON (default: planned)."""
    init_from: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Begin with the weights of a trained model of the same config: the --output-dir of a run.
    For train_vae.py also the Hub id of a VAE."""
    seed: int = 42
    """Random seed. All randomness in a step derives from this seed and the number of the step."""


@dataclass(kw_only=True, frozen=True)
class HubFlags:
    """Publish the model on the Hub."""

    push_to_hub: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Push the VAE or the pipeline to the Hub when training ends."""
    hub_model_id: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Id of the repository on the Hub: user/name. It is created if it does not exist, private unless --hub-public is
    given."""
    hub_strategy: Literal["end", "best", "checkpoint"] = flag("end", may_change=True)
    """When to push: at the end; or also the best model so far whenever a checkpoint is saved; or that model and the
    checkpoint, as last-checkpoint/ in the repository."""
    license: Annotated[str | None, SHOWN_IN_TEXT] = flag(None, may_change=True)
    """License in the model card, by its name on the Hub, such as cc-by-4.0."""
    hub_public: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Create a public repository: everybody can load the model."""


@dataclass(kw_only=True, frozen=True)
class OptimizerFlags:
    """How the weights are updated."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon makes the steps of convolutions and matrices orthogonal, and uses AdamW for all other weights."""
    learning_rate: Annotated[float | None, tyro.conf.arg(aliases=["--lr"], help_behavior_hint="")] = None
    """Peak learning rate (default: 1e-4; for a UNet with --config tiny 2e-3, with base or large 5e-4)."""
    lr_scheduler: LR_SCHEDULERS = "cosine"
    """Schedule of the learning rate. cosine and cosine_warm_restarts end at --lr-min.
    plateau halves the rate, down to --lr-min. linear and the names after it are schedules of diffusers."""
    lr_min: Annotated[float | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Lowest learning rate of cosine, cosine_warm_restarts and plateau
    (default: 1e-5, or a tenth of a --learning-rate below that)."""
    lr_warmup_steps: int = 30
    """Number of steps in which the learning rate rises to its peak."""
    weight_decay: float = 1e-2
    """Weight decay, decoupled from the gradient as in AdamW."""
    adam_beta1: float = 0.9
    """AdamW: decay of the average of gradients, per step."""
    adam_beta2: float = 0.999
    """AdamW: decay of the average of squared gradients, per step."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the divisor of a step."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradients. Larger gradients are scaled down to it."""
    ema: bool = True
    """Validate, sample and save with an exponential moving average (EMA) of the weights."""
    ema_decay: float = 0.9999
    """Maximum decay of the EMA. Until it is reached, the decay rises with the number of steps.
    The EMA then averages over a fraction of the steps: the last 8 % of 2,000 steps, the last 3 % of 30,000."""


@dataclass(kw_only=True, frozen=True)
class SpeedFlags:
    """Precision, speed and memory."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Mixed precision. auto means fp16 on CUDA.
    On a CPU with bf16 in hardware, auto times a few steps and selects bf16 or no. Otherwise auto means no."""
    no_mixed_precision: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Same as --mixed-precision no."""
    change_precision: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True, in_card=False)
    """Let --resume continue a run in another precision, such as an fp16 run on a machine without a GPU.
    The run then no longer ends with the weights that it would have had without the interruption."""
    attention: Literal["auto", "fused", "math"] = flag("auto", may_change=True)
    """Attention kernel on a CPU. In bf16, auto times a few steps and selects the faster one. Otherwise it is fused."""
    cuda_graphs: bool = flag(True, may_change=True)
    """On one GPU, record the forward and backward pass as CUDA graphs, and replay them if that is faster."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Compile the model with torch.compile after the first steps.
    Compiling takes minutes. The script prints whether the run saves more time than that."""
    auto_batch_size: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True, in_card=False)
    """If the run is out of memory, halve --batch-size, double --grad-accum, and continue from the newest checkpoint.
    The result is the same within rounding. This works in one process."""
    gradient_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Recompute activations in the backward pass instead of storing them.
    The gradients are the same. Training needs less memory and is slower."""
    num_workers: int = flag(0, may_change=True, in_card=False)
    """Number of processes that load batches in advance.
    Pixels and latents are computed once and cached, so 0 is fastest on most machines."""
