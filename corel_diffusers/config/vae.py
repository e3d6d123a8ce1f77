"""The flags of train_vae.py."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import tyro

from corel_diffusers.config import flag_groups as groups
from corel_diffusers.config.checks import flag, require
from corel_diffusers.config.training import TrainingArguments


@dataclass(kw_only=True, frozen=True)
class VAEPhotoFlags(groups.PhotoFlags):
    """Which photos to train on, and at which size."""

    grey: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Convert the photos to grey and train with one channel: the pipeline then generates grey images.
    This is the default if all photos are grey."""
    no_grey: Annotated[bool, tyro.conf.FlagCreatePairsOff] = flag(False, may_change=True)
    """Train with three channels even if all photos are grey."""


@dataclass(kw_only=True, frozen=True)
class VAEOutputFlags(groups.OutputFlags):
    """Where the run is saved, and how it is continued."""

    output_dir: str = flag("vae_models", may_change=True)


@dataclass(kw_only=True, frozen=True)
class VAEModelFlags(groups.ModelFlags):
    """What is trained."""

    latent_dim: Annotated[int | None, groups.SHOWN_IN_TEXT] = None
    """Number of latent channels (default: the config's)."""
    downsample: Annotated[Literal[4, 8, 16] | None, groups.SHOWN_IN_TEXT] = None
    """Pixels per latent position, in each direction (default: the config's)."""


@dataclass(kw_only=True, frozen=True)
class VAEAugmentationFlags:
    """How photos change from epoch to epoch. Half of them are mirrored."""

    crop_chance: float = 0.3
    """Fraction of training photos that are replaced by a random crop at a random scale.
    The crop is cut from the photo at up to two and a half times the training size."""
    colour_jitter: float = 0.05
    """Colour jitter: brightness and contrast change by up to this fraction."""


@dataclass(kw_only=True, frozen=True)
class VAELossFlags:
    """What the VAE learns."""

    reconstruction: Literal["l1", "mse"] = "l1"
    """Distance between photo and reconstruction, averaged over all values."""
    perceptual: bool = True
    """Add a perceptual loss: the distance in the features of a frozen network."""
    perceptual_weight: Annotated[float | None, groups.SHOWN_IN_TEXT] = None
    """Weight of the perceptual loss (default: 0.3; 1 in a long run of a tiny model)."""
    perceptual_network: Literal["efficientnet-lite0", "vgg16"] = "efficientnet-lite0"
    """Frozen network of the perceptual loss. vgg16 needs torchvision and its weights."""
    adversarial_weight: Annotated[float | None, groups.SHOWN_IN_TEXT] = None
    """Weight of the adversarial loss of a patch discriminator, relative to the gradient of the reconstruction loss at
    the last layer (0: no discriminator; default: 0.3 in a long run of a tiny model, otherwise 0)."""
    adversarial_start: float = 0.4
    """Fraction of the run after which the adversarial loss starts.
    The discriminator starts to learn a tenth of the run earlier."""
    kl_weight: Annotated[float | None, groups.SHOWN_IN_TEXT] = None
    """Final weight of the KL divergence in nats per photo (default: 0.4 / pixels, which is 1e-4 at 64 px; half of
    that in a long run of a tiny model)."""
    kl_warmup: int = 10
    """Epochs in which the KL weight rises to its final value; at most a third of the run."""
    kl_target: Annotated[float | None, groups.SHOWN_IN_TEXT] = None
    """Adjust the KL weight so that the KL divergence reaches this many nats per photo.
    The adjustment begins at the first step, and --kl-warmup is not used (default: the weight is --kl-weight)."""


@dataclass(kw_only=True, frozen=True)
class VAEOptimizerFlags(groups.OptimizerFlags):
    """How the weights are updated."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer. muon makes the steps of convolutions and matrices orthogonal, and uses AdamW for all other weights."""


@dataclass(kw_only=True, frozen=True)
class VAEArguments(
    VAEPhotoFlags,
    VAEOutputFlags,
    VAEModelFlags,
    VAEAugmentationFlags,
    VAELossFlags,
    VAEOptimizerFlags,
    TrainingArguments,
):
    """Train an AutoencoderKL from scratch.
    These options are planned if you leave them unset: --config, --image-size, --batch-size, the length of the run and
    the weights of the loss."""

    GROUPS: ClassVar[tuple[type, ...]] = (
        VAEPhotoFlags,
        groups.LengthFlags,
        VAEOutputFlags,
        groups.IntervalFlags,
        VAEModelFlags,
        VAELossFlags,
        VAEAugmentationFlags,
        groups.HubFlags,
        VAEOptimizerFlags,
        groups.SpeedFlags,
    )
    MODEL: ClassVar[str] = "vae"
    PLANNED: ClassVar[tuple[str, ...]] = (
        *TrainingArguments.PLANNED,
        "perceptual_weight",
        "adversarial_weight",
        "kl_weight",
    )
    CHECKPOINT_EVERY: ClassVar[int] = 20

    def checked(self) -> Self:
        """See TrainingArguments.checked."""
        flags = super().checked()
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
        require(not (self.grey and self.no_grey), "grey", "--no-grey", "give only one of the two")
        require(0 <= self.crop_chance <= 1, "crop_chance", self.crop_chance, "give a fraction from 0 to 1")
        require(0 <= self.colour_jitter < 1, "colour_jitter", self.colour_jitter, "give a fraction from 0 to below 1")
        require(self.latent_dim is None or self.latent_dim >= 1, "latent_dim", self.latent_dim, "give 1 or more")
        require(self.kl_target is None or self.kl_target > 0, "kl_target", self.kl_target, "give a number above 0")
        return flags

    def resolved(self, plan: dict) -> Self:
        """See TrainingArguments.resolved. Weights of the loss that the plan does not contain have default values."""
        args = super().resolved(plan)
        defaults = {
            "perceptual_weight": 0.3,
            "adversarial_weight": 0.0,
            "kl_weight": 0.4 / math.prod(args.size_px),
        }
        return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
