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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, then renames it into place: a reader never sees half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` to fill, then puts it in the place of `path`, an older one of that name included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def published_model(folder: Path, marker: str) -> Iterator[Path]:
    """Yields an empty folder to save a model in, then moves its files into `folder`, which may hold other things as well.

    `marker` is the file that loading starts from (`config.json`, `model_index.json`): it goes first and comes back last, so
    that new weights are never read with an old config, and a run killed in between leaves no model rather than a mixed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / ".publishing"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    yield staged
    (folder / marker).unlink(missing_ok=True)
    files = sorted((f for f in staged.rglob("*") if f.is_file()), key=lambda f: f == staged / marker)
    for file in files:
        target = folder / file.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(staged)


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): correct it or remove it") from None
