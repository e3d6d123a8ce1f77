"""Let only one living run write to a folder.

The lock is a file that names its process and its machine. It uses no lock of the file system, because network file
systems do not keep all of them. The lock of a dead process is no obstacle: on the same machine its process is looked
up, and on another machine a living run renews the time of the file.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from corel_diffusers.files import UserError, explain_full_disk

LOCK = ".running.json"
RENEWED_SECONDS = 60  # a living run renews the time of its lock this often
WRITTEN_SECONDS = 3  # writing a lock never takes so long
DEAD_SECONDS = 900  # a lock of another machine that is older than this belongs to a dead run


@contextmanager
def locked(run_dir: Path, is_writer: bool) -> Iterator[None]:
    """Hold the lock of a run's folder inside this context.

    Args:
        is_writer: whether this process writes to the folder. Only the main process of a run does.

    Raises:
        UserError: a living run holds the lock.
    """
    if not is_writer:
        yield
        return
    lock, is_over = run_dir / LOCK, threading.Event()
    new_folders = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    with explain_full_disk(run_dir):
        take(lock)
    threading.Thread(target=renew, args=(lock, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        lock.unlink(missing_ok=True)
        for folder in new_folders:  # a run that failed before it wrote anything leaves no empty folders
            with suppress(OSError):
                folder.rmdir()


def take(lock: Path) -> None:
    """Create the lock file.

    Raises:
        UserError: a living run holds the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    owner = {"process": os.getpid(), "machine": socket.gethostname(), "started": started(os.getpid())}
    while True:
        try:
            with lock.open("x", encoding="utf-8") as file:  # exactly one of several processes creates it
                json.dump(owner, file)
            return
        except FileExistsError:
            remove_dead(lock)
        except OSError:  # the disk is full: an empty lock would be in the way of the next run
            lock.unlink(missing_ok=True)
            raise


def remove_dead(lock: Path) -> None:
    """Remove the lock of a dead run.

    Raises:
        UserError: the run is alive.
    """
    age = 0.0
    try:
        age = time.time() - lock.stat().st_mtime
        owner = json.loads(lock.read_text(encoding="utf-8"))
        is_here = owner["machine"] == socket.gethostname()
        # another process can have the number of a dead one by now; the system's start time may differ by a second
        is_alive = abs((started(owner["process"]) or 0) - owner["started"]) < 2 if is_here else age < DEAD_SECONDS
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        if age < WRITTEN_SECONDS:  # the other run is writing it
            time.sleep(0.1)
            return
        is_alive = False  # the run was killed while it wrote its lock
    if is_alive:
        raise UserError(
            f"--output-dir {lock.parent} is in use by another run, process {owner['process']} on {owner['machine']}: "
            "wait for its end, or give another folder"
        )
    lock.unlink(missing_ok=True)


def renew(lock: Path, is_over: threading.Event) -> None:
    """Renew the time of the lock file until the run is over."""
    while not is_over.wait(RENEWED_SECONDS):
        with suppress(OSError):
            os.utime(lock)


def started(process: int) -> float | None:
    """Return when a process of this machine was started, in seconds since 1970, or None if it does not run any more."""
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.NoSuchProcess:
        return None
