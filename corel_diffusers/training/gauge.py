"""The overfitting gauge: the loss of held-out photos divided by that of training photos, at the same noise."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DModel

from corel_diffusers.data.latents import scale_latents
from corel_diffusers.data.mixed_sizes import Array, MixedArray, parts_of
from corel_diffusers.data.pixels import evenly_spaced
from corel_diffusers.losses.diffusion import Diffusion
from corel_diffusers.runtime.processes import broadcast_from_main
from corel_diffusers.training.run import Run
from corel_diffusers.training.stopping import update_best_loss, update_early_stopping

BANDS = 4  # equal ranges of timesteps; the first one has the least noise

MAX_MEASURED = 2048  # maximum number of held-out photos, evenly spaced, on which the denoising loss is measured
FIXED_NOISE_PAIRS = 128  # minimum number of pairs of noise and timestep; each photo has at least one pair
GAUGE = "overfitting gauge: held-out / training loss"
# gauge / its minimum when the first copy in pixels was found, in two measurements on 60 Corel photos:
# benchmarks/results/overfitting.md
COPIES_BEGAN = {
    1.11: "first copy in a reference run (1)",
    1.46: "first copy in a reference run (2)",
}
# A model is saved as best if its gauge is below this multiple of the minimum, or if its held-out loss is the lowest so
# far. Saving does not stop at the lowest held-out loss, because recall and diversity still improve after it. The limit
# was chosen with an older version of the search for copies, and it was not measured again
# (benchmarks/results/choices.md, "How strong, and until when").
SAVE_UP_TO_GAUGE = 1.05
PANEL = {
    "gauge": "all timesteps",
    **{f"gauge_{band + 1}": f"t {1000 * band // BANDS} to {1000 * (band + 1) // BANDS}" for band in range(BANDS)},
}


class FixedNoiseSet(NamedTuple):
    """Fixed inputs of the UNet for measuring the loss. The labels are None for an unconditional model."""

    latents: torch.Tensor  # (N, C, h, w)
    noise: torch.Tensor  # (N, C, h, w)
    timesteps: torch.Tensor  # (N,)
    labels: torch.Tensor | None  # (N,)


@dataclass
class OverfittingGauge:
    """Measures the losses of training photos and of held-out photos at fixed noise and timesteps."""

    training_sets: list[FixedNoiseSet]  # one per image size
    held_out_sets: list[FixedNoiseSet]

    @classmethod
    def of(
        cls,
        vae: AutoencoderKL,
        moments: dict[str, Array | MixedArray],
        labels: dict[str, np.ndarray],
        has_classes: bool,
        diffusion: Diffusion,
    ) -> "OverfittingGauge":
        """Choose the photos: at most MAX_MEASURED held-out photos, and as many training photos.

        The training photos have the classes and the image sizes of the held-out photos.

        Args:
            moments: the posteriors of all versions of the photos, by split, see `cache_moments`.
            labels: the label of each photo, by split.
            has_classes: whether the UNet is conditioned on the labels.
        """
        rows = {split: [] for split in ("train", "validation")}  # one array of rows per image size
        held_out_rows = evenly_spaced(len(labels["validation"]), MAX_MEASURED)
        sizes = {split: size_numbers(array) for split, array in moments.items()}
        for size in np.unique(sizes["validation"][held_out_rows]):
            held_out = held_out_rows[sizes["validation"][held_out_rows] == size]
            candidates = np.flatnonzero(sizes["train"] == size)
            chosen = matching_photos(labels["train"][candidates], labels["validation"][held_out])
            rows["train"].append(candidates[chosen])
            rows["validation"].append(held_out)
        repeats = -(-FIXED_NOISE_PAIRS // len(held_out_rows))

        def fixed_sets(split: str) -> list[FixedNoiseSet]:
            return [
                fixed_noise_set(
                    vae, moments[split][photos, 0], labels[split][photos] if has_classes else None, repeats, diffusion
                )
                for photos in rows[split]
            ]

        return cls(fixed_sets("train"), fixed_sets("validation"))

    @property
    def forward_passes(self) -> int:
        """The number of pairs of noise and timestep that one measurement runs through the UNet."""
        return sum(len(fixed_set.latents) for fixed_set in self.training_sets + self.held_out_sets)

    def measure(self, unet: UNet2DModel, diffusion: Diffusion, accelerator: Accelerator) -> dict[str, float]:
        """Return the losses and the gauge of `overfitting_gauge`, the same on all ranks."""
        with accelerator.autocast():
            values = overfitting_gauge(unet, diffusion, self.training_sets, self.held_out_sets)
        return broadcast_from_main(accelerator, values)


def record_validation(run: Run, values: dict[str, float]) -> bool:
    """Update the early stopping of the run with the values of a measurement. Return whether to save the model as best.

    Below the limit of the gauge, a lower loss of training photos counts as progress. Above it, only a lower loss of
    held-out photos does.
    """
    limit = SAVE_UP_TO_GAUGE * lowest_gauge([*run.history, values])
    is_healthy = values["gauge"] < limit
    # at the limit, val_loss / limit is seen_loss, so the watched loss does not jump
    watched_loss = values["seen_loss"] if is_healthy else values["val_loss"] / limit
    update_early_stopping(run.state, watched_loss, run.args.early_stopping_delta, run.args.oscillation_window)
    return update_best_loss(run.state, values["val_loss"]) or is_healthy


def first_copy_lines(history: list[dict]) -> dict[str, list[tuple[float, str]]]:
    """Return the reference lines of the plot.

    They show where the gauge of this run would be if it rose as far as in the measurements of COPIES_BEGAN."""
    lowest = lowest_gauge(history) if history else 0.0
    return {GAUGE: [(multiple * lowest, f"{event} on 60 photos") for multiple, event in COPIES_BEGAN.items()]}


def size_numbers(moments: Array | MixedArray) -> np.ndarray:
    """Return a number for the size of the latents of each photo: (N,). The same size has the same number."""
    numbers = np.array([2**16 * part.shape[3] + part.shape[4] for part in parts_of(moments)])
    return numbers[moments.part_of] if isinstance(moments, MixedArray) else np.full(len(moments), numbers[0])


def fixed_noise_set(
    vae: AutoencoderKL,
    moments: np.ndarray,
    labels: np.ndarray | None,
    repeats: int,
    diffusion: Diffusion,
) -> FixedNoiseSet:
    """Return latents, noise, timesteps and labels on which the loss of a set of photos is measured.

    They are the same in each validation, so that chance does not change the loss. Each photo is used equally often. Its
    latents are the mean of its posterior. The timesteps are evenly spaced. Two sets with the same number of photos have
    the same noise and timesteps.

    Args:
        moments: (N, 2C, h, w), the mean and log-variance of each photo's posterior.
        labels: (N,), or None for an unconditional model.
        repeats: the number of pairs of noise and timestep of each photo.
    """
    device = vae.device
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor(moments).chunk(2, dim=1)[0].repeat(repeats, 1, 1, 1)
    noise = torch.randn(means.shape, generator=generator)
    order = torch.randperm(len(means), generator=generator)
    timesteps = (order + 0.5) / len(means) * diffusion.num_timesteps
    repeated_labels = None if labels is None else torch.from_numpy(labels).repeat(repeats).to(device)
    return FixedNoiseSet(
        scale_latents(means, vae).to(device), noise.to(device), timesteps.long().to(device), repeated_labels
    )


def matching_photos(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the indices of photos with the same number per class as in `wanted`, evenly spaced in each class.

    If a class has too few photos, its photos are repeated. If it has none, photos of any class are used instead.

    Args:
        labels: the label of each photo.
        wanted: one label for each photo to choose.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"the gauge compares photos per class: labels must be integers, not {labels.dtype}")
    chosen, missing = [], 0
    for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        candidates = np.flatnonzero(labels == label)
        if len(candidates):
            chosen.append(np.resize(candidates[evenly_spaced(len(candidates), count)], count))
        else:
            missing += count
    if missing:
        chosen.append(np.resize(evenly_spaced(len(labels), missing), missing))
    return np.sort(np.concatenate(chosen))


@torch.no_grad()
def denoising_losses(unet: UNet2DModel, diffusion: Diffusion, fixed_sets: list[FixedNoiseSet]) -> dict[str, float]:
    """Return the mean denoising loss on the fixed inputs: "loss" for all, "loss_1" to "loss_4" for bands of timesteps.

    The first band has the least noise.
    """
    losses = []
    for fixed_set in fixed_sets:
        for rows in torch.arange(len(fixed_set.latents)).split(64):
            part = fixed_set.latents[rows], fixed_set.noise[rows], fixed_set.timesteps[rows]
            model_pred = unet(
                diffusion.add_noise(*part), part[2], None if fixed_set.labels is None else fixed_set.labels[rows]
            ).sample
            losses.append(diffusion.losses(model_pred, *part))
    losses = torch.cat(losses)
    bands = torch.cat([fixed_set.timesteps for fixed_set in fixed_sets]) * BANDS // diffusion.num_timesteps
    return {"loss": float(losses.mean())} | {
        f"loss_{band + 1}": float(losses[bands == band].mean()) for band in range(BANDS)
    }


def overfitting_gauge(
    unet: UNet2DModel,
    diffusion: Diffusion,
    training_sets: list[FixedNoiseSet],
    held_out_sets: list[FixedNoiseSet],
) -> dict[str, float]:
    """Return the losses of held-out photos ("val_…") and training photos ("seen_…"), and their ratios ("gauge…").

    Both losses are measured at the same noise. The gauge is the loss of held-out photos divided by that of training
    photos. It stays level while the model learns what photos have in common. It rises when the model memorises the
    training photos.
    """
    training_photo_losses = denoising_losses(unet, diffusion, training_sets)
    held_out_photo_losses = denoising_losses(unet, diffusion, held_out_sets)
    values = {f"val_{name}": value for name, value in held_out_photo_losses.items()} | {
        f"seen_{name}": value for name, value in training_photo_losses.items()
    }
    return values | {
        name.replace("loss", "gauge"): held_out_photo_losses[name] / training_photo_losses[name]
        for name in training_photo_losses
    }


def lowest_gauge(history: list[dict]) -> float:
    """Return the minimum of the gauge over the validations whose held-out loss is within 5 % of the lowest one.

    The gauge of the first validations has no meaning: at the beginning, the loss depends only on how bright the photos
    are, so the gauge compares the brightness of the two sets of photos.
    """
    lowest = min(record["val_loss"] for record in history)
    return min(record["gauge"] for record in history if record["val_loss"] <= 1.05 * lowest)
