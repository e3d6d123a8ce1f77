"""The flags of train_unet.py."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import tyro

from corel_diffusers.config import flag_groups as groups
from corel_diffusers.config.checks import flag, model_location, require
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.files import UserError


@dataclass(kw_only=True, frozen=True)
class UNetOutputFlags(groups.OutputFlags):
    """Where the run is saved, and how it is continued."""

    output_dir: str = flag("diffusion_models", may_change=True)


@dataclass(kw_only=True, frozen=True)
class UNetModelFlags(groups.ModelFlags):
    """What is trained."""

    vae_checkpoint: str = flag("vae_models", may_change=True)
    """Folder of a VAE that train_vae.py trained, or the Hub id of an AutoencoderKL."""
    unconditional: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train without class labels."""
    dropout: Annotated[float | None, groups.SHOWN_IN_TEXT] = None
    """Dropout: fraction of inner values set to zero in each forward pass of training (default: the config's)."""
    label_dropout: float = 0.1
    """Fraction of labels replaced by the null label. It must be above 0 if there are classes:
    guidance leads away from the prediction for the null label."""


@dataclass(kw_only=True, frozen=True)
class UNetAugmentationFlags:
    """Augmented crops of the photos. Half of the photos and of the crops are mirrored."""

    views: Annotated[int | None, groups.SHOWN_IN_TEXT] = None
    """Number of augmented crops per photo, with colour jitter, to train on in addition to the photo.
    The UNet is conditioned on the crop parameters, so its samples are not cropped.
    Default: planned, 16 if the run sees each photo so often that it would memorise it, otherwise 0."""
    view_chance: float = 0.5
    """Fraction of training images that are augmented crops."""


@dataclass(kw_only=True, frozen=True)
class UNetLossFlags:
    """What the UNet learns: noise schedule, prediction and loss."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """What the UNet predicts: the noise, the velocity or the clean latents."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule over the 1000 timesteps."""
    zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make the last timestep pure noise (Lin et al. 2023). Not possible with --prediction-type epsilon."""
    timesteps: Literal["uniform", "log-normal"] = "uniform"
    """How timesteps are drawn in training. log-normal prefers medium noise levels."""
    log_normal: tuple[float, float] = (0.3, 1.2)
    """Mean and standard deviation of the log noise level for --timesteps log-normal. Latents have unit variance."""
    min_snr_gamma: float = 5.0
    """Min-SNR weights of the loss (Hang et al. 2023): min(SNR, gamma) / (SNR + 1) with v_prediction (0: equal weights).
    This favours the noise levels at which images take shape."""
    align_weight: float = 0.25
    """Weight of the alignment loss (0: off).
    This loss pulls inner features of the UNet towards a frozen network's features of the clean photo."""


@dataclass(kw_only=True, frozen=True)
class StoppingFlags:
    """Evaluations during the run, and when it stops early: by its losses at fixed noise and timesteps."""

    evaluate_every: int = flag(0, may_change=True)
    """Epochs between evaluations of a few samples (0: none).
    An evaluation adds KID and copies to metrics.jsonl and the plot."""
    early_stopping_patience: Annotated[int | None, groups.SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Stop after this many validations without a lower loss (0: never stop early; default: 30).
    The loss is that of training photos while the overfitting gauge is healthy, and that of held-out photos otherwise.
    The default with --max-train-minutes is to stop after a tenth of the minutes without a model to save as best."""
    early_stopping_delta: float = flag(1e-5, may_change=True)
    """A loss counts as lower only if it is lower by at least this much."""
    oscillation_window: Annotated[int | None, groups.SHOWN_IN_TEXT] = flag(None, may_change=True)
    """Stop if the loss oscillates without falling in this many validations.
    0 turns the check off. Default: 10, or 0 with --max-train-minutes."""
    oscillation_threshold: float = flag(0.0005, may_change=True)
    """The oscillation check compares the minimum loss in the second half of the window with that in the first half.
    The loss counts as falling if the second minimum is lower by more than this."""


@dataclass(kw_only=True, frozen=True)
class UNetArguments(
    UNetOutputFlags, UNetModelFlags, UNetAugmentationFlags, UNetLossFlags, StoppingFlags, TrainingArguments
):
    """Train a UNet2DModel from scratch in the latent space of a VAE, and save the pipeline.
    These options are planned if you leave them unset: --config, --batch-size, --views and the length of the run."""

    GROUPS: ClassVar[tuple[type, ...]] = (
        groups.PhotoFlags,
        groups.LengthFlags,
        UNetOutputFlags,
        groups.IntervalFlags,
        UNetModelFlags,
        UNetLossFlags,
        UNetAugmentationFlags,
        StoppingFlags,
        groups.HubFlags,
        groups.OptimizerFlags,
        groups.SpeedFlags,
    )
    MODEL: ClassVar[str] = "unet"
    PLANNED: ClassVar[tuple[str, ...]] = ("config", "batch_size", "views")  # the image size is the VAE's
    LEARNING_RATES: ClassVar[dict[str, float]] = {"tiny": 2e-3, "base": 5e-4, "large": 5e-4}
    MUON_SCALE: ClassVar[float] = 2.0

    def checked(self) -> Self:
        """See TrainingArguments.checked."""
        flags = super().checked()
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
        _ = self.vae_location  # raises UserError if there is no such folder
        return flags

    def resolved(self, plan: dict) -> Self:
        """See TrainingArguments.resolved. The defaults of early stopping are different with --max-train-minutes."""
        args = super().resolved(plan)
        patience, window = (None, 0) if args.max_train_minutes else (30, 10)
        return replace(
            args,
            early_stopping_patience=patience if args.early_stopping_patience is None else args.early_stopping_patience,
            oscillation_window=window if args.oscillation_window is None else args.oscillation_window,
        )

    @cached_property
    def vae_location(self) -> Path | str:
        """The folder of the VAE as a Path, or its Hub id as a string."""
        return model_location(self.vae_checkpoint, self.base_dir, "--vae-checkpoint")
