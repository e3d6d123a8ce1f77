"""Read the files beside the photos of a folder: classes.txt, captions.json and split.json."""

import re
import unicodedata
from pathlib import Path

from corel_diffusers.data.folder_contents import FolderContents
from corel_diffusers.files import UserError, read_json


def read_classes(file: Path, found: FolderContents) -> dict[int, str]:
    """Read classes.txt (one `<number> <name>` per line) as class number -> name; empty if there is no such file.

    A classes.txt of another program has other lines. It is ignored, with a notice.

    Raises:
        UserError: only some of the lines are valid, or two classes have the same name.
    """
    if not file.is_file():
        return {}
    lines = unicodedata.normalize("NFC", file.read_text(encoding="utf-8-sig", errors="replace")).splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    matches = {number: re.fullmatch(r"(\d+)\s+(\S.*)", line) for number, line in numbered}
    if not any(matches.values()):
        found.notices.append(f"{file} is ignored: its lines are not '<number> <name>'")
        return {}
    for number, line in numbered:
        if not matches[number]:
            raise UserError(f"{file} line {number}: {line!r} is not '<number> <name>'")
    classes = {int(match[1]): match[2] for match in matches.values()}
    if len(set(classes.values())) < len(classes):
        raise UserError(f"{file}: two classes have the same name: give each class its own name")
    return classes


def read_captions(file: Path) -> dict[str, str]:
    """Read captions.json, file name -> caption; empty if there is no such file."""
    captions = read_json(file) if file.is_file() else {}
    if not isinstance(captions, dict) or not all(isinstance(c, str) for c in captions.values()):
        raise UserError(f"{file}: expected one object {{file name: caption}}")
    return {unicodedata.normalize("NFC", name): caption for name, caption in captions.items()}


def read_split(file: Path) -> dict[str, str]:
    """Return file name -> split of split.json; empty if there is no such file."""
    if not file.is_file():
        return {}
    splits = read_json(file)
    parts = list(splits.values()) if isinstance(splits, dict) else [None]
    are_lists = all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in parts)
    if not are_lists or "validation" not in splits:
        raise UserError(f'{file}: expected {{"train": [...], "validation": [...]}}; delete it for a new split')
    by_split = {split: splits.get(split, ()) for split in ("train", "validation", "test")}
    return {unicodedata.normalize("NFC", name): split for split, names in by_split.items() for name in names}
