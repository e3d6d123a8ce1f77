"""How files get onto the disk (whole or not at all) and how a user's mistake gets onto the screen (one line, exit code 2).

Nothing here imports anything heavy: the command line uses it before torch is loaded.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

MARKERS = ("model_index.json", "config.json")  # what loading a pipeline, a model starts from


class UserError(Exception):
    """Something the user can mend: its text names the flag or the file and the way out."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2; everything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or on a CPU, where torch raises a plain RuntimeError."""
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def require_writable(folder: Path, flag: str) -> None:
    """Raises UserError where `folder` cannot be written to, or not be made; writes nothing."""
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path)), folder)
    if os.path.isfile(there):
        raise UserError(f"{flag}: {there} is a file, and no folder can be made there: give another place")
    if not os.access(there, os.W_OK):
        raise UserError(f"{flag}: {there} cannot be written to: give another place")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, then renames it into place: a reader never sees half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{uuid4().hex}{path.suffix}")  # containers on one disk may share process ids
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def published_model(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to save a model in, then moves its files into `folder`, which may hold other things as well.

    The file that loading starts from (MARKERS) goes first and comes back last, so that new weights are never read with an old
    config. What a kill leaves in between, `finish_publishing` makes good.
    """
    finish_publishing(folder)
    staged = folder / ".publishing"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    os.replace(staged, folder / ".published")  # complete: from here on it will be the model, whatever happens
    finish_publishing(folder)


def finish_publishing(folder: Path) -> None:
    """Moves what `published_model` completed into its place; where a kill interrupted that, goes on."""
    complete = folder / ".published"
    if not complete.is_dir():
        return
    files = sorted((f for f in complete.rglob("*") if f.is_file()), key=lambda f: f.parent == complete and f.name in MARKERS)
    for marker in MARKERS:
        if complete / marker in files:
            (folder / marker).unlink(missing_ok=True)
    for file in files:
        target = folder / file.relative_to(complete)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(complete)


def flush_folder(folder: Path) -> None:
    """Has the disk hold the files of a folder, and their names, before anything else is done. Nothing else on the machine is flushed."""
    for path in (*(file for file in folder.iterdir() if file.is_file()), folder):
        if os.name == "nt" and path == folder:  # Windows opens no folders
            continue
        descriptor = os.open(path, os.O_RDONLY if path == folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Removes a folder; a kill in between leaves it under a hidden name, not gutted under its own."""
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def first_line(error: Exception) -> str:
    """What an error of a library says, as a part of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; one cut off by a kill, which can only be the last, is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def best_record(history: list[dict]) -> dict:
    """The validation whose model is in the run's folder; of runs that did not note it, the lowest loss."""
    published = [record for record in history if record.get("published")]
    return published[-1] if published else min(history, key=lambda record: record["val_loss"])


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole; leaves it alone when it already holds the same."""
    if not (path.is_file() and path.read_bytes() == content):
        with whole_file(path) as beside:
            beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text whole; leaves the file alone when it already says the same."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON whole; leaves the file alone when it already says the same."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object:
    """Reads a JSON file that a user may have written: what is wrong with it becomes a UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): correct it or remove it") from None
