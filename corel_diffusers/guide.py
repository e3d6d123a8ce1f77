"""The guide of autoguidance: the UNet's own averaged weights after a small part of its training (Karras et al. 2024, arXiv:2406.02507)."""

import math
from pathlib import Path

from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from corel_diffusers.checkpoints import find_checkpoints, step_of
from corel_diffusers.files import whole_file

# benchmarks/results/choices.md, "Guidance by an early self": measured with the `tiny` UNet on 221 photos
SHARE = 1 / 8  # of the steps of the UNet that is guided, as near as a power of two comes
GUIDED_FROM = 130_000  # pictures; a UNet that has seen fewer comes nearer to photos guided by itself without the class


def guide_step(step: int) -> int:
    """The step whose weights guide the UNet of `step`: of the powers of two, the nearest to SHARE of it, in ratio."""
    return 2 ** max(0, round(math.log2(SHARE * step)))


class Guide:
    """Keeps a UNet's weights at each doubling of the steps, in `snapshots/` of the run's folder, and finds those that guide it."""

    def __init__(self, run_dir: Path, unet: UNet2DModel, global_batch: int) -> None:
        self.folder, self.unet = run_dir / "snapshots", unet
        self.guided_from = math.ceil(GUIDED_FROM / global_batch)
        self.loaded: tuple[int, UNet2DModel] | None = None

    def file(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"

    def due(self, step: int) -> bool:
        """Whether a later step may ask for the weights of this one."""
        return step.bit_count() == 1 and step >= guide_step(self.guided_from)

    def keep(self, step: int) -> None:
        """Writes the weights of now, and removes those that nothing asks for, whichever checkpoint the run goes on from."""
        with whole_file(self.file(step)) as beside:
            save_file({name: value.contiguous() for name, value in self.unet.state_dict().items()}, beside)
        oldest = next(map(step_of, find_checkpoints(self.folder.parent)), 1)
        for file in self.folder.glob("step-*.safetensors"):
            if step_of(file) < guide_step(max(oldest, self.guided_from)):
                file.unlink()

    def of(self, step: int) -> UNet2DModel | None:
        """The guide for the UNet as it is after `step` steps, on the CPU; None while it needs none, and in a run older than snapshots."""
        file = self.file(guide_step(step))
        if step < self.guided_from or not file.is_file():
            return None
        if self.loaded is None or self.loaded[0] != guide_step(step):
            model = UNet2DModel.from_config(self.unet.config).eval()
            model.load_state_dict(load_file(file))
            self.loaded = guide_step(step), model
        return self.loaded[1]
