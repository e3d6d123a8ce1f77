"""Decide when a run validates, samples and saves a checkpoint."""

import math

from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.data.batches import BatchPlan
from corel_diffusers.training.run import Run

CHECKPOINT_SECONDS = 600  # maximum time between checkpoints, so a crash loses at most this much training


def checkpoint_due(run: Run) -> bool:
    """Return whether to save a checkpoint after this step.

    --checkpoint-every is the number of epochs between checkpoints, --checkpoint-steps the number of steps. If both are
    unset, a checkpoint is saved every ten minutes. A run that ends by time then saves one after each tenth of its time,
    if that is sooner. Any other run also saves one every CHECKPOINT_EVERY epochs.
    """
    args, length, step, seconds = run.args, run.length, run.state.step, run.state.seconds
    if args.checkpoint_steps:
        return step % args.checkpoint_steps == 0
    if args.checkpoint_every:
        return run.plan.ends_epoch(step, args.checkpoint_every)
    interval = min(length.seconds / 10, CHECKPOINT_SECONDS) if length.seconds else CHECKPOINT_SECONDS
    interval_passed = seconds // interval > length.previous_seconds // interval
    return interval_passed or (not length.seconds and run.plan.ends_epoch(step, args.CHECKPOINT_EVERY))


def samples_due(run: Run) -> bool:
    """Return whether the validation after this step also writes samples.

    It does so every --sample-every epochs (default: 10). A run that ends by time has samples after each tenth of its
    time by default.
    """
    total_seconds = run.length.seconds
    if run.args.sample_every or not total_seconds:
        return run.epoch % (run.args.sample_every or 10) < run.validate_every
    previous_seconds = run.history[-1]["seconds"] if run.history else 0.0
    return 10 * run.state.seconds // total_seconds > 10 * previous_seconds // total_seconds


def epochs_between_validations(args: TrainingArguments, plan: BatchPlan, forward_passes: int) -> int:
    """Return the number of epochs between two validations: --validate-every, if it is set.

    Otherwise it is the smallest number for which validation takes 3 % of the time or less. The cost of a training step
    is counted as three forward passes per photo. A run with a length in epochs or steps has at least ten validations,
    even if they take more time. Samples and evaluations come with a validation, so --sample-every and --evaluate-every
    make it at least as frequent.

    Args:
        forward_passes: number of photos that each rank runs through the model in one validation.
    """
    every = math.ceil(forward_passes * plan.num_processes / (0.03 * 3 * plan.steps_per_epoch * plan.global_batch))
    epochs = math.ceil(args.max_train_steps / plan.steps_per_epoch) if args.max_train_steps else args.epochs
    every = every if args.max_train_minutes else min(every, max(1, epochs // 10))
    asked = [interval for interval in (args.sample_every, getattr(args, "evaluate_every", 0)) if interval]
    return args.validate_every or min([every, *asked])
