"""The guide model of autoguidance (Karras et al. 2024, arXiv:2406.02507).

The guide model is an early version of the UNet: its own averaged weights after a small fraction of its training steps.
"""

import math
from pathlib import Path

from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from corel_diffusers.files import atomic_file
from corel_diffusers.training.checkpoints import find_checkpoints, step_of

# Both numbers were chosen with the `tiny` UNet on 221 photos, by the KID of an earlier measure. They were not measured
# again: benchmarks/results/choices.md, "Guidance by an early self".
GUIDE_FRACTION = 1 / 8  # steps of the guide model / steps of the guided UNet, before rounding to a power of two
# images seen; with fewer, guidance is classifier-free
GUIDE_FROM_IMAGES = 130_000


def guide_step(step: int) -> int:
    """Return the step whose weights guide the UNet of `step`: GUIDE_FRACTION x step, rounded to a power of two.

    The rounding is done on the logarithm, so the ratio is off by a factor of at most sqrt(2).
    """
    return 2 ** max(0, round(math.log2(GUIDE_FRACTION * step)))


class Guide:
    """Saves snapshots of a UNet's weights at power-of-two steps, and loads the guide model from them.

    The snapshots are in `snapshots/` of the run folder.
    """

    def __init__(self, run_dir: Path, unet: UNet2DModel, global_batch: int) -> None:
        self.folder, self.unet = run_dir / "snapshots", unet
        self.guided_from = math.ceil(GUIDE_FROM_IMAGES / global_batch)
        self.loaded: tuple[int, UNet2DModel] | None = None

    def file(self, step: int) -> Path:
        """Return the path of the snapshot of a step."""
        return self.folder / f"step-{step:06d}.safetensors"

    def due(self, step: int) -> bool:
        """Return whether a later UNet can need the weights of this step as its guide model."""
        return step.bit_count() == 1 and step >= guide_step(self.guided_from)

    def keep(self, step: int) -> None:
        """Save the current weights, and remove the snapshots that are no longer needed.

        A snapshot stays if the run can need it after resuming from any of its checkpoints.
        """
        with atomic_file(self.file(step)) as temporary:
            save_file({name: value.contiguous() for name, value in self.unet.state_dict().items()}, temporary)
        oldest = next(map(step_of, find_checkpoints(self.folder.parent)), 1)
        for file in self.folder.glob("step-*.safetensors"):
            if step_of(file) < guide_step(max(oldest, self.guided_from)):
                file.unlink()

    def of(self, step: int) -> UNet2DModel | None:
        """Return the guide model for the UNet after `step` steps, on the CPU.

        Return None if the UNet has seen fewer than GUIDE_FROM_IMAGES images, or if there is no snapshot. Runs of older
        versions have no snapshots.
        """
        file = self.file(guide_step(step))
        if step < self.guided_from or not file.is_file():
            return None
        if self.loaded is None or self.loaded[0] != guide_step(step):
            model = type(self.unet).from_config(self.unet.config).eval()
            model.load_state_dict(load_file(file))
            self.loaded = guide_step(step), model
        return self.loaded[1]
