"""Communication between the processes of a run."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from corel_diffusers.files import UserError


def broadcast_from_main(accelerator: Accelerator, value: object) -> object:
    """Return the main process's value on every rank.

    The ranks must make the same decisions, but their own values can differ: measurements differ in the last bit, and a
    file may be on the main process's machine only.
    """
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def run_on_main(accelerator: Accelerator, work: Callable[[], object]) -> object:
    """Run `work` on the main process only, and return its result on every rank.

    Raises:
        UserError: on every rank, also on other machines, if `work` raises it on the main process.
    """
    value, error = None, ""
    if accelerator.is_main_process:
        try:
            value = work()
        except UserError as raised:
            error = str(raised)
    value, error = broadcast_from_main(accelerator, (value, error))
    if error:
        raise UserError(error)
    return value
