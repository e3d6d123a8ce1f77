"""The flags of other training programs: the flags here that mean the same, and what to give instead of the rest.

The programs are diffusers' `train_unconditional.py` and `train_autoencoderkl.py`, denoising-diffusion-pytorch (the
arguments of its Trainer and its models), and kohya's scripts. `translate` replaces their flags in a command line before
it is parsed. docs/from-diffusers.md has the same tables; a test compares them.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from corel_diffusers.files import UserError


class OtherFlag(NamedTuple):
    """A flag of another program. Exactly one of `ours`, `always`, `instead` and `variable` is given."""

    ours: str = ""  # the flag here that means the same
    values: Mapping[str, str] = {}  # their values -> ours, where the names differ
    always: str = ""  # why the flag changes nothing: it is accepted
    instead: str = ""  # what to give instead: the flag is refused
    variable: str = ""  # the environment variable that gets the value
    has_value: bool = True
    off: str = ""  # for a flag without a value: the flag here that means its False


FLAGS = {
    # photos
    "--train-data-dir": OtherFlag("--data-dir"),
    "--resolution": OtherFlag("--image-size"),
    "--center-crop": OtherFlag(always="photos are cut to their centre", has_value=False),
    "--random-flip": OtherFlag(always="half of the photos are mirrored in each step", has_value=False),
    "--dataloader-num-workers": OtherFlag("--num-workers"),
    "--cache-dir": OtherFlag(instead="set the environment variable HF_HOME"),
    "--image-column": OtherFlag(instead="omit it: the first column of images is used"),
    "--caption-column": OtherFlag(instead="omit it: captions are not used in training"),
    # model
    "--model-config-name-or-path": OtherFlag("--config"),
    "--pretrained-model-name-or-path": OtherFlag("--init-from"),
    "--revision": OtherFlag(instead="omit it: the main branch is used"),
    "--non-ema-revision": OtherFlag(instead="omit it: the main branch is used"),
    "--enable-xformers-memory-efficient-attention": OtherFlag(always="torch's attention is used", has_value=False),
    # length and batch size
    "--num-epochs": OtherFlag("--epochs"),
    "--num-train-epochs": OtherFlag("--epochs"),
    "--train-batch-size": OtherFlag("--batch-size"),
    "--eval-batch-size": OtherFlag(always="the training batch size is used"),
    "--gradient-accumulation-steps": OtherFlag("--grad-accum"),
    # optimisation
    "--adam-weight-decay": OtherFlag("--weight-decay"),
    "--use-8bit-adam": OtherFlag(instead="omit it, or give --optimizer muon, which keeps one state", has_value=False),
    "--scale-lr": OtherFlag(instead="give the scaled rate as --learning-rate", has_value=False),
    "--lr-num-cycles": OtherFlag(instead="omit it: cosine_with_restarts has one cycle"),
    "--lr-power": OtherFlag(instead="omit it: polynomial has the power 1"),
    "--use-ema": OtherFlag("--ema", has_value=False, off="--no-ema"),
    "--ema-max-decay": OtherFlag("--ema-decay"),
    "--ema-inv-gamma": OtherFlag(instead="omit it: the decay rises with the number of steps (see --ema-decay)"),
    "--ema-power": OtherFlag(instead="omit it: the decay rises with the number of steps (see --ema-decay)"),
    "--allow-tf32": OtherFlag(always="TF32 is on", has_value=False),
    "--set-grads-to-none": OtherFlag(always="gradients are set to None", has_value=False),
    # loss of the VAE
    "--rec-loss": OtherFlag("--reconstruction", values={"l2": "mse"}),
    "--kl-scale": OtherFlag(instead="omit it, or give --kl-weight, which is per nat and photo"),
    "--disc-start": OtherFlag(instead="give --adversarial-start, a fraction of the run"),
    "--disc-factor": OtherFlag(instead="give --adversarial-weight"),
    "--disc-scale": OtherFlag(instead="give --adversarial-weight"),
    "--perceptual-scale": OtherFlag("--perceptual-weight"),
    "--disc-learning-rate": OtherFlag(instead="omit it: the discriminator has the learning rate of the VAE"),
    "--disc-lr-scheduler": OtherFlag(instead="omit it: the discriminator has the schedule of the VAE"),
    "--disc-loss": OtherFlag(instead="omit it: the discriminator has a hinge loss"),
    "--decoder-only": OtherFlag(instead="omit it: encoder and decoder are trained together", has_value=False),
    # diffusion
    "--ddpm-num-steps": OtherFlag(instead="omit it: there are 1000 timesteps"),
    "--ddpm-num-inference-steps": OtherFlag(always="samples during training are drawn in 20 steps"),
    "--ddpm-beta-schedule": OtherFlag("--schedule", values={"squaredcos_cap_v2": "cosine"}),
    # intervals and outputs
    "--save-images-epochs": OtherFlag("--sample-every"),
    "--save-model-epochs": OtherFlag("--checkpoint-every"),
    "--checkpointing-steps": OtherFlag("--checkpoint-steps"),
    "--checkpoints-total-limit": OtherFlag("--keep-checkpoints"),
    "--resume-from-checkpoint": OtherFlag("--resume"),
    "--overwrite-output-dir": OtherFlag(instead="give another --output-dir, or remove that folder", has_value=False),
    "--validation-steps": OtherFlag(instead="give --validate-every, in epochs"),
    "--validation-image": OtherFlag(instead="omit it: held-out photos are reconstructed"),
    "--logger": OtherFlag("--report-to"),
    "--logging-dir": OtherFlag(instead="omit it: the logs are in the --output-dir"),
    "--tracker-project-name": OtherFlag(instead="omit it: the tracker's project has the name of the script"),
    "--local-rank": OtherFlag(always="accelerate launch sets it"),
    # denoising-diffusion-pytorch: the arguments of its Trainer
    "--folder": OtherFlag("--data-dir"),
    "--train-num-steps": OtherFlag("--max-train-steps"),
    "--train-lr": OtherFlag("--learning-rate"),
    "--gradient-accumulate-every": OtherFlag("--grad-accum"),
    "--results-folder": OtherFlag("--output-dir"),
    "--save-and-sample-every": OtherFlag(instead="give --sample-every, in epochs, and --checkpoint-steps"),
    "--ema-update-every": OtherFlag(instead="omit it: the EMA is updated in each step"),
    "--num-samples": OtherFlag(instead="omit it: the grids during training have 12 samples"),
    "--adam-betas": OtherFlag(instead="give --adam-beta1 and --adam-beta2"),
    "--mixed-precision-type": OtherFlag("--mixed-precision"),
    "--split-batches": OtherFlag(instead="omit it: --batch-size is the number of photos per device", has_value=False),
    "--convert-image-to": OtherFlag(instead="omit it: photos are read as RGB, or as grey if all of them are grey"),
    "--calculate-fid": OtherFlag(
        instead="give --evaluate-every, in epochs, or run corel-diffusers evaluate --features inception afterwards",
        has_value=False,
    ),
    "--inception-block-idx": OtherFlag(instead="run corel-diffusers evaluate --features inception afterwards"),
    "--num-fid-samples": OtherFlag(instead="run corel-diffusers evaluate --num-images afterwards"),
    "--save-best-and-latest-only": OtherFlag(
        always="the folder holds the best model so far, and checkpoints/ the latest ones", has_value=False
    ),
    # and of its GaussianDiffusion and Unet
    "--objective": OtherFlag(
        "--prediction-type", values={"pred_noise": "epsilon", "pred_v": "v_prediction", "pred_x0": "sample"}
    ),
    "--beta-schedule": OtherFlag("--schedule"),
    "--sampling-timesteps": OtherFlag(always="samples during training are drawn in 20 steps"),
    "--dim": OtherFlag(instead="give --config tiny, base, large or a JSON file"),
    "--dim-mults": OtherFlag(instead="give --config tiny, base, large or a JSON file"),
    "--amp": OtherFlag(always="fp16 is used on a GPU (see --mixed-precision)", has_value=False),
    "--augment-horizontal-flip": OtherFlag(always="half of the photos are mirrored in each step", has_value=False),
    # kohya's scripts
    "--max-train-epochs": OtherFlag("--epochs"),
    "--enable-bucket": OtherFlag("--aspect-buckets", has_value=False),
    "--save-every-n-steps": OtherFlag("--checkpoint-steps"),
    "--save-every-n-epochs": OtherFlag("--checkpoint-every"),
    "--sample-every-n-epochs": OtherFlag("--sample-every"),
    "--optimizer-type": OtherFlag(instead="give --optimizer adamw or muon"),
    "--flip-aug": OtherFlag(always="half of the photos are mirrored in each step", has_value=False),
    "--cache-latents": OtherFlag(always="latents are always cached", has_value=False),
    # the Hub
    "--hub-token": OtherFlag(variable="HF_TOKEN"),
    "--hub-private-repo": OtherFlag(always="a new repository is private", has_value=False),
}

# of the commands generate and evaluate
SAMPLING_FLAGS = {
    "--num-samples": OtherFlag("--num-images"),
    "--num-fid-samples": OtherFlag("--num-images"),
    "--num-inference-steps": OtherFlag("--steps"),
    "--ddpm-num-inference-steps": OtherFlag("--steps"),
    "--sampling-timesteps": OtherFlag("--steps"),
    "--eval-batch-size": OtherFlag("--batch-size"),
}


def translate(words: Sequence[str], flags: Mapping[str, OtherFlag] = FLAGS) -> list[str]:
    """Return the words of a command line with the flags of other programs replaced by ours.

    Args:
        flags: FLAGS for training, SAMPLING_FLAGS for `generate` and `evaluate`.

    Raises:
        UserError: flags have no meaning here. The message says what to give instead of each of them.
    """
    result, refused, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        other = flags.get(name.replace("_", "-")) if name.startswith("--") else None
        if other is None:
            result.append(word)
            continue
        if other.instead:
            refused.append(f"{name} has no meaning here: {other.instead}")
            continue
        if not other.has_value and rest and rest[0].lower() in ("true", "false"):  # some programs want --use_ema True
            value = rest.pop(0)
        if other.has_value and not equals:
            if not rest:
                raise UserError(f"{name} needs a value")
            value = rest.pop(0)
        if other.always:
            print(f"notice: {name} changes nothing: {other.always}")
        elif other.variable:
            os.environ[other.variable] = value
        elif not other.has_value and value.lower() == "false":
            result += [other.off] if other.off else []  # the others are off if they are left out
        else:
            result += [other.ours, *([other.values.get(value, value)] if other.has_value else [])]
    if refused:
        raise UserError("; ".join(refused))
    return result
