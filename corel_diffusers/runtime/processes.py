"""The processes of a run: communication."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def broadcast_from_main(accelerator: Accelerator, value: object) -> object:
    """Return the main process's value on every rank.

    The ranks must make the same decisions, but their own values can differ: measurements differ in the last bit, and a
    file may be on the main process's machine only.
    """
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def run_on_main(accelerator: Accelerator, work: Callable[[], object]) -> object:
    """Run `work` on the main process only, and return its result on every rank.

    Raises:
        Exception: on every rank, also on other machines, what `work` raises on the main process.
    """
    value, error = None, None
    if accelerator.is_main_process:
        try:
            value = work()
        except Exception as raised:  # the other ranks would wait for the value for ever
            error = raised
    value, error = broadcast_from_main(accelerator, (value, error))
    if error:
        raise error
    return value
