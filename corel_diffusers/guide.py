"""The guide of autoguidance: the UNet's own averaged weights after a small part of its training (Karras et al. 2024, arXiv:2406.02507)."""

import math
from pathlib import Path

from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from corel_diffusers.checkpoints import find_checkpoints, step_of
from corel_diffusers.files import whole_file

# benchmarks/results/choices.md, "Guidance by an early self"
SHARE = 1 / 8  # of the steps of the UNet that is guided, as near as a power of two comes
GUIDED_FROM = 80_000  # pictures; a UNet that has seen fewer comes nearer to photos when it is guided by itself without the class


def snapshot_due(step: int) -> bool:
    """At each doubling of the steps: whichever later step is published, one near its SHARE was kept."""
    return step.bit_count() == 1


def guide_step(step: int) -> int:
    """The snapshot that guides the UNet of a step."""
    return 2 ** max(0, round(math.log2(SHARE * step)))


def snapshot(run_dir: Path, step: int) -> Path:
    """Where a run keeps the snapshot of a step."""
    return run_dir / "guides" / f"step-{step:06d}.safetensors"


def save_snapshot(run_dir: Path, step: int, unet: UNet2DModel) -> None:
    """Keeps the UNet's weights of now, and removes those that nothing will ask for, whichever checkpoint the run goes on from."""
    with whole_file(snapshot(run_dir, step)) as beside:
        save_file({name: value.contiguous() for name, value in unet.state_dict().items()}, beside)
    oldest = next((step_of(checkpoint) for checkpoint in find_checkpoints(run_dir)), 1)
    for file in (run_dir / "guides").glob("step-*.safetensors"):
        if step_of(file) < guide_step(oldest):
            file.unlink()


def load_guide(run_dir: Path, step: int, unet: UNet2DModel, images_seen: int) -> UNet2DModel | None:
    """The guide for `unet` as it is after `step` steps; None where it has seen too few pictures, and in a run older than snapshots."""
    kept = snapshot(run_dir, guide_step(step))
    if images_seen < GUIDED_FROM or not kept.is_file():
        return None
    guide = UNet2DModel.from_config(unet.config).to(unet.device).eval()
    guide.load_state_dict(load_file(kept))
    return guide
