"""What a folder of photos contains."""

import re
from dataclasses import dataclass, field
from pathlib import Path

# words in the names of folders that hold a split, and the split
SPLIT_FOLDERS = dict.fromkeys(("train", "training"), "train")
SPLIT_FOLDERS |= dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation")
SPLIT_FOLDERS |= dict.fromkeys(("test", "testing"), "test")


# what may stand around such a word: train2017/ and val_images/ hold splits, and steam_train/ is a class
WORD = "|".join(SPLIT_FOLDERS)
BESIDE = r"images?|imgs?|photos?|pictures?|data|set|split"
SPLIT_NAME = rf"(?:(?:{BESIDE})[ _-])?(?P<word>{WORD})(?:[ _-]?(?:20\d\d|{BESIDE}))*"


@dataclass
class Photo:
    """One photo of a folder. `class_number` is None if the folder has no classes, and `split` if it has no splits."""

    path: Path
    file_name: str
    class_number: int | None = None
    caption: str | None = None
    split: str | None = None


@dataclass
class FolderContents:
    """The contents of a photo folder.

    `photos` is sorted by file name. `classes` maps class number -> name. `left_out` maps file name -> reason. `notices`
    are messages for the user.
    """

    layout: str
    photos: list[Photo]
    classes: dict[int, str]
    left_out: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def split_named(folder: str) -> str | None:
    """Return the split that a folder or a column value is named after, or None."""
    match = re.fullmatch(SPLIT_NAME, folder.strip().lower())
    return SPLIT_FOLDERS[match["word"]] if match else None


def default_caption(class_name: str | None) -> str:
    return f"a photo of a {class_name}" if class_name else "a photo"
