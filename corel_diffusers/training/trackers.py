"""Send the flags, the metrics and the images of a run to experiment trackers."""

import numpy as np
from accelerate import Accelerator
from PIL import Image

from corel_diffusers.config.command_line import given_flags
from corel_diffusers.config.training import TrainingArguments


def start_trackers(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Start the trackers of --report-to, with the flags of the run as hyperparameters."""
    flags = given_flags(args) | args.planned | args.timed
    values = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in flags.items()}
    accelerator.init_trackers(args.script, config=values)


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send an image to the trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step)
        elif tracker.name == "trackio":  # accelerate's tracker has no log_images
            import trackio

            tracker.log({name: trackio.Image(image)}, step)
