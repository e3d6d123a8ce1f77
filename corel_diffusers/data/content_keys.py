"""Keys that change when a photo changes, for the caches."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from corel_diffusers.data.decoding import unreadable_file
from corel_diffusers.internals import fingerprint

SAMPLE_BYTES = 2**14  # bytes hashed in each of three places of a file: see `file_sample`


def content_key(part: Dataset, rows: Sequence[dict]) -> object:
    """Return a value that changes when a photo of the split changes.

    For a dataset that is memory-mapped and contains its photos as bytes, this is the fingerprint that `datasets`
    computes. The photos are not read for it: reading a million photos would take longer than the step that waits for
    the key.
    """
    return fingerprint(part) if part.cache_files and rows[0]["bytes"] is not None else [file_key(row) for row in rows]


def file_key(row: dict) -> tuple:
    """Return a value that changes when a photo changes.

    It is a hash of the bytes, or the path, size, modification time and `file_sample` of the file.
    """
    if row["bytes"] is not None:
        return (hashlib.sha256(row["bytes"]).hexdigest(),)
    path = Path(row["path"])
    try:
        stat = path.stat()
        return (str(path.resolve()), stat.st_size, stat.st_mtime_ns, file_sample(path, stat.st_size))
    except OSError as error:
        raise unreadable_file(path, error) from None


def file_sample(path: Path, size: int) -> str:
    """Return a hash of a file of `size` bytes. For a large file, only its first, middle and last SAMPLE_BYTES are read.

    The size and the modification time do not detect every change: archive and sync tools can write a new file with the
    same size and restore the old time. Reading ten thousand large files completely would take minutes.
    """
    with path.open("rb") as file:
        if size <= 4 * SAMPLE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()
        parts = []
        for start in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            file.seek(start)
            parts.append(file.read(SAMPLE_BYTES))
        return hashlib.sha256(b"".join(parts)).hexdigest()
