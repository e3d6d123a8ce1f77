"""Notice steps whose gradients are NaN or infinite, and go back to the last checkpoint if they do not end.

A single such step is skipped by `optimizer_step`. In fp16 some are normal: the gradient scaler then halves its scale.
"""

from dataclasses import replace
from functools import partial

from corel_diffusers.files import UserError
from corel_diffusers.runtime.processes import broadcast_from_main, run_on_main
from corel_diffusers.training import checkpoints, history, intervals
from corel_diffusers.training.optimizers import SkippedSteps
from corel_diffusers.training.resume import newest_whole
from corel_diffusers.training.run import Run
from corel_diffusers.training.running_mean import RunningMean

CHECK_EVERY = 10  # steps: a GPU has to be waited for, to read the numbers
MAX_IN_A_ROW = 10  # so many skipped steps in a row are no single bad batch
MAX_IN_A_ROW_FP16 = 30  # after 16 steps, the scale of fp16 has fallen from 65,536 to 1
MAX_RETURNS = 2
RATE_FACTOR = 1 / 3  # of the learning rate after a return


def has_diverged(run: Run, parts: checkpoints.Parts, is_snapshot: bool = False) -> bool:
    """Return whether too many steps in a row were skipped, or a weight or a value of the optimizer is NaN or infinite.

    It counts the skipped steps at every tenth step: after a weight became NaN, all steps are skipped. It looks at the
    values at each step that is followed by a validation, a checkpoint or a snapshot, so none of these sees such values.

    Args:
        is_snapshot: whether the weights of this step become a snapshot for the guide model.
    """
    step = run.state.step
    is_counted = step % CHECK_EVERY == 0
    is_followed = (
        is_snapshot
        or run.is_over
        or run.plan.ends_epoch(step, run.validate_every)
        or intervals.checkpoint_due(run)
        # a signal is followed by a checkpoint; several processes exchange signals at every tenth step
        or (run.stop.number if run.accelerator.num_processes == 1 else is_counted)
    )
    if not (is_counted or is_followed):
        return False
    limit = MAX_IN_A_ROW_FP16 if run.accelerator.scaler else MAX_IN_A_ROW
    if int(run.skipped.in_a_row) >= limit or (is_followed and not checkpoints.values_are_finite(parts)):
        return True
    if (new := int(run.skipped.total) - run.skipped.told) and not run.accelerator.scaler:
        run.skipped.told += new
        run.accelerator.print(f"notice: gradients were NaN or infinite: steps skipped since the last notice: {new}")
    return False


def go_back(run: Run, parts: checkpoints.Parts) -> None:
    """Continue from the newest whole checkpoint with a third of the learning rate. The minutes of the run go on.

    Raises:
        UserError: there is no checkpoint, the run has gone back twice already, or its minutes are over. Models and
            checkpoints in the folder are those of the last good steps.
    """
    accelerator, state, args = run.accelerator, run.state, run.args
    found = broadcast_from_main(accelerator, checkpoints.find_checkpoints(args.run_dir))
    reason = f"weights or gradients are NaN or infinite at step {state.step}"
    rate = args.learning_rate * state.rate_factor
    if not found or state.returns == MAX_RETURNS or (run.length.seconds and run.is_over):
        after = f", for the third time, with a learning rate of {rate:.2g}" if state.returns == MAX_RETURNS else ""
        hint = f"try --lr {rate / 3:.1g} (was {args.learning_rate:g}) with another --output-dir"
        raise UserError(f"{reason}{after}: {hint}")
    # the files may be on the machine of the main process only
    run.checkpoint = run_on_main(accelerator, partial(newest_whole, args.run_dir, found))
    saved = run_on_main(accelerator, partial(checkpoints.read_state, run.checkpoint))
    run.state = replace(
        saved,
        seconds=state.seconds,
        stop_reason="",
        returns=state.returns + 1,
        rate_factor=state.rate_factor * RATE_FACTOR,
    )
    accelerator.print(
        f"notice: {reason}: the run goes back to step {run.state.step}, learning rate {rate * RATE_FACTOR:.2g}"
    )
    checkpoints.load(run, parts)
    run.means, run.skipped = RunningMean(run.state, accelerator.device), SkippedSteps()
    history.restore_history(run, repeats_exactly=False)
    run.bar.n = run.bar.last_print_n = run.state.step * run.plan.global_batch
    run.bar.refresh()
    checkpoints.save(run, parts)  # a crash does not make it forget that it has gone back
