"""Read metadata files: rows with the name, the label and the captions of each photo, as `datasets` reads them."""

import codecs
import csv
import io
import json
import posixpath
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pyarrow import parquet

from corel_diffusers.data.folder_contents import split_named
from corel_diffusers.files import UserError

FILE_KEYS = ("file_name", "filename", "file", "image", "path")
LABEL_KEYS = ("label", "class", "category", "class_name", "cls")
SPLIT_KEYS = ("split", "subset", "partition")
CAPTION_KEYS = ("caption", "text", "prompt", "description", "captions")


@dataclass
class Row:
    """What the metadata files say about one photo."""

    label: str | None = None
    captions: list[str] = field(default_factory=list)
    split: str | None = None


def read_metadata(files: dict[str, Path]) -> dict[str, Row]:
    """Return relative path of a photo -> Row. Several rows of one photo are joined: they are several captions.

    Args:
        files: relative path -> path on disk of the metadata files. The photos of a file are relative to its folder.

    Raises:
        UserError: a file cannot be read, or a row has no file name, or two rows give one photo two labels.
    """
    rows: dict[str, Row] = {}
    for relative, path in files.items():
        for values in read_rows(path):
            name = first_given(values, FILE_KEYS)
            if not isinstance(name, str):
                raise UserError(f"{path}: each row must have file_name, the path of a photo relative to this file")
            photo = posixpath.normpath(PurePosixPath(relative).parent / name.replace("\\", "/"))
            if photo.startswith(("../", "/")) or re.match(r"[A-Za-z]:", photo):
                raise UserError(f"{path}: {name!a} lies outside the folder of photos: copy it into the folder")
            photo = unicodedata.normalize("NFC", photo)
            row = rows.setdefault(photo, Row())
            label = label_of(path, first_given(values, LABEL_KEYS))
            if None not in (label, row.label) and label != row.label:
                raise UserError(f"{path}: {name} has two labels, {row.label} and {label}: keep one")
            row.label = row.label if label is None else label
            row.split = split_of(path, first_given(values, SPLIT_KEYS)) or row.split
            captions = first_given(values, CAPTION_KEYS) or []
            row.captions += [str(text) for text in (captions if isinstance(captions, list) else [captions])]
    return rows


def first_given(values: dict, keys: tuple[str, ...]) -> object:
    """Return the first value of a row that is not missing or empty, or None."""
    return next((values[key] for key in keys if values.get(key) not in (None, "")), None)


def label_of(path: Path, value: object) -> str | None:
    """Return a label as text, or None for a missing one: NaN and -1 stand for it too.

    Raises:
        UserError: the label is a list or an object.
    """
    if value is None or str(value).lower() in ("-1", "-1.0", "nan"):
        return None
    if isinstance(value, list | dict):
        raise UserError(f"{path}: the label {value} is not a name or a number: give one class per photo")
    if isinstance(value, float) and value.is_integer():  # a table with gaps stores its integers so
        value = int(value)
    return unicodedata.normalize("NFC", str(value).strip()) or None


def split_of(path: Path, value: object) -> str | None:
    """Return the split "train", "validation" or "test" of a row, or None.

    Raises:
        UserError: the split has another name.
    """
    if value is None:
        return None
    if (split := split_named(str(value))) is None:
        raise UserError(f"{path}: the split {value} is unknown: give train, validation or test")
    return split


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a .jsonl, .csv or .parquet file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        content = path.read_bytes()
        text = content.decode(
            "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        )
        if path.suffix == ".csv":
            header = text.split("\n", 1)[0]
            delimiter = max(",;\t", key=header.count)  # spreadsheets write ";" in many countries
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
            return [row for row in rows if any(row.values())]
        # not splitlines(): it also splits at characters that JSON allows inside a line
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error):
        hint = "a table with a first line of column names" if path.suffix == ".csv" else "one JSON object per line"
        raise UserError(f"{path} cannot be read: it must be {hint}, in UTF-8, with file_name") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): write it again") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} cannot be read: it must be one JSON object per line, in UTF-8, with file_name")
    return rows
