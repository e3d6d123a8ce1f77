"""The processes of a run: communication, and the signals that stop them."""

import signal
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

# Ctrl-C, the end of a job, and, except on Windows, a terminal that is closed
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
