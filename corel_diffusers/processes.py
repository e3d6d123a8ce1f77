"""What the processes of a run tell each other."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from corel_diffusers.files import UserError


def of_main_process(accelerator: Accelerator, value: object) -> object:
    """The first rank's value on every rank. What each measures or reads alike may still differ, in the last bit or because only the first
    rank's machine has the file; what is decided by it must not."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def on_main_process(accelerator: Accelerator, work: Callable[[], object]) -> object:
    """What the first rank's work comes to, on every rank. A UserError of it ends each of them, on other machines too."""
    value, error = None, ""
    if accelerator.is_main_process:
        try:
            value = work()
        except UserError as raised:
            error = str(raised)
    value, error = of_main_process(accelerator, (value, error))
    if error:
        raise UserError(error)
    return value
