"""Read and write files (atomically), and errors that the user can correct (UserError: one line, exit code 2).

This module imports no heavy modules, because the command line uses it before torch is loaded.
"""

import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from uuid import uuid4

# control characters, line and paragraph separators, and (as surrogates) bytes that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


# Ctrl-C, the end of a job, a warning before its end (SLURM), and, except on Windows, a terminal that is closed
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a full disk, a full quota, a read-only disk


class UserError(Exception):
    """An error that the user can correct. Its text names the flag or the file, and says what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Give a program its exit codes and its last line: this context is around everything that it does.

    A UserError and a full disk become one line on stderr and exit code 2. Each of STOP_SIGNALS becomes exit code 128 +
    its number, and files that are being written are cleaned up. If the program that reads the output ends first, as in
    `train_vae.py --help | head`, this program ends quietly. Other exceptions keep their traceback.
    """
    try:
        with handling_signals(exit_with_signal):
            yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered is written there
        sys.exit(1)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        # explain_full_disk gives a better line where the place is known
        file = printable(str(error.filename or "a file"))
        print(f"error: {file} cannot be written ({error.strerror}): make room there", file=sys.stderr)
        sys.exit(2)


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle STOP_SIGNALS inside this context, except those that are ignored, as `nohup` does with SIGHUP.

    Python lets only the main thread install signal handlers. In another thread, nothing changes.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before or signal.SIG_DFL)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block STOP_SIGNALS inside this context. Processes that are started inside it inherit this and never receive them.

    This process receives them at the end of the context. Windows cannot block signals: there, nothing changes.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # a process that multiprocessing needs for workers
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # again: its start unblocks SIGINT and SIGTERM
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def exit_with_signal(number: int, frame: object) -> None:
    """Exit with the code of a signal."""
    os.write(2, b"stopped: to go on, run the same command again\n")  # print could be what the signal has interrupted
    sys.exit(128 + number)


def printable(text: str) -> str:
    """Return text with each character that a terminal or a list of lines cannot show replaced by U+FFFD.

    Names of files and classes come from strangers: an escape sequence in a name could rewrite the screen.
    """
    return UNPRINTABLE.sub("\ufffd", text)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that a GPU or the machine is out of memory.

    The text is checked as well, because on a CPU torch raises a plain RuntimeError.
    """
    return (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "can't allocate memory" in str(error)
    )


def require_writable(folder: Path, flag: str) -> None:
    """Raise UserError if `folder` cannot be created or cannot be written to. This function itself writes nothing."""
    existing = next((path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path)), folder)
    if not os.path.isdir(existing):
        kind = "a file" if os.path.isfile(existing) else "not a folder"
        raise UserError(f"{flag}: {existing} is {kind}, so no folder can be created there: give another path")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{flag}: {existing} cannot be written to: give another path")


def require_space(folder: Path, name: str, num_bytes: int) -> None:
    """Raise UserError if a disk has less free space than what will be written to a folder on it.

    Args:
        folder: it need not exist yet.
        name: the environment variable or the flag that names the folder.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        needed, left = (f"{value / 1e6:,.0f} MB" for value in (num_bytes, free))
        hint = f"make room there, or give another folder as {name}"
        raise UserError(f"{name}: {folder} needs about {needed} more, and its disk has {left} left: {hint}")


@contextmanager
def explain_full_disk(folder: Path, name: str = "") -> Iterator[None]:
    """Turn the error of a full or read-only disk into a UserError that names the folder.

    Libraries raise many types for it, so the text of the error decides.

    Args:
        name: the environment variable or the flag that names the folder.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reasons = [os.strerror(number) for number in CANNOT_WRITE]
        if not (reason := next((reason for reason in reasons if reason in str(error)), None)):
            raise
        raise UserError(
            f"{name and name + ': '}{folder} cannot be written to ({reason}): make room there, then give the same "
            "command again (a training script with --resume latest)"
        ) from None


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename that file to `path` at the end of the context.

    A reader therefore never sees an incomplete file.

    Raises:
        UserError: the disk is full.
    """
    # a random name: containers that share a disk can have the same process ids
    temporary = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        with explain_full_disk(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # the folder may not exist
            temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk.

    Data of other folders is not flushed.
    """
    for path in (*(file for file in folder.iterdir() if file.is_file()), folder):
        if os.name == "nt" and path == folder:  # Windows cannot open folders
            continue
        descriptor = os.open(path, os.O_RDONLY if path == folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Remove a folder.

    The folder is first renamed to a hidden name. If the process is killed in between, no incomplete folder is left
    under the old name.
    """
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def first_line(error: Exception) -> str:
    """Return the first line of an error message, or the type of the error if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_metrics(path: Path) -> list[dict]:
    """Read metrics.jsonl. A last line that a kill has cut off is left out, and any other damaged line with a notice."""
    records, text = [], path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and "step" in record:
            records.append(record)
        elif number < len(lines) or text.endswith("\n"):
            print(f"notice: {path} line {number} is damaged: it is left out")
    return records


def best_record(history: list[dict]) -> dict:
    """Return the validation whose model is in the run folder: the latest one that was saved as best.

    Runs of older versions did not record this. For them, it is the validation with the lowest loss.
    """
    saved = [record for record in history if record.get("published")]
    return saved[-1] if saved else min(history, key=lambda record: record["val_loss"])


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Do not touch it if it already has this content."""
    if not (path.is_file() and path.read_bytes() == content):
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Do not touch the file if it already has this text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically. Do not touch the file if it already has this content."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object:
    """Read a JSON file, which a user may have edited.

    Raises:
        UserError: the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also a number of too many digits, and lists in lists in lists
        raise UserError(f"{path} is not valid JSON ({error}): correct it or remove it") from None
