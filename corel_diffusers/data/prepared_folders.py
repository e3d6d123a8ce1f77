"""Write the prepared folders: photos, lists and contact sheet."""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from corel_diffusers.data.decoding import open_photo
from corel_diffusers.data.folder_contents import FolderContents, Photo, default_caption
from corel_diffusers.data.splits import SPLITS
from corel_diffusers.files import atomic_file, write_json, write_text
from corel_diffusers.plots import SHEET_PX, contact_sheet, save_image

LISTS = ("metadata.jsonl", "captions.json", "split.json", "classes.txt")  # of each prepared folder


@dataclass
class Prepared:
    """How one photo was prepared: a line of prepared.jsonl."""

    source: str
    size: int
    changed: int  # modification time of the source, nanoseconds
    trim: bool
    file_name: str
    borders: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, right, bottom, px
    phashes: tuple[str, str] = ("", "")  # of the photo and its mirror image
    reason: str = ""  # why the photo was left out; empty if it was not


def read_prepared(record: Path) -> Iterable[Prepared]:
    """Yield the lines of prepared.jsonl, without a line that is incomplete because the run was killed."""
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if Path(str(values.get("file_name", ""))).name != values.get("file_name"):
            continue  # a name that leads out of the folder
        if "phashes" in values:  # otherwise an older version wrote the line, and the photo is prepared again
            yield Prepared(**values | {name: tuple(values[name]) for name in ("borders", "phashes")})


def write_duplicates(corel: Path, photos: list[Photo], groups: list[int]) -> int:
    """Write duplicates.json, a list of duplicate groups, and return the number of photos in them.

    The kind of a group is "exact" if all its files have the same bytes, and "near" otherwise.
    """
    members = defaultdict(list)
    for photo, group in zip(photos, groups, strict=True):
        members[group].append(photo)
    duplicates = []
    for same in members.values():
        if len(same) > 1:
            exact = len({hashlib.sha256(photo.path.read_bytes()).digest() for photo in same}) == 1
            duplicates.append({"kind": "exact" if exact else "near", "photos": [photo.file_name for photo in same]})
    write_json(corel / "duplicates.json", duplicates)
    return sum(len(group["photos"]) for group in duplicates)


def write_folders(
    corel: Path, found: FolderContents, photos: list[Photo], file_names: list[str], split_names: list[str]
) -> None:
    """Write the list files of corel_all/, and class_0001/ and so on with the photos and list files of one class.

    The photos of a class folder are hard links if the disk supports hard links, and copies otherwise.
    """
    rows = []
    for photo, name, split in zip(photos, file_names, split_names, strict=True):
        label = found.classes.get(photo.class_number, "photo")
        caption = photo.caption or default_caption(found.classes.get(photo.class_number))
        rows.append(({"file_name": name, "label": label, "caption": caption}, split, photo.class_number))
    write_lists(corel / "corel_all", rows, found.classes)
    for number, class_name in found.classes.items():
        folder = corel / f"class_{number:04d}"
        folder.mkdir(exist_ok=True)
        of_class = [row for row in rows if row[2] == number]
        for values, _, _ in of_class:
            link_or_copy(corel / "corel_all" / values["file_name"], folder / values["file_name"])
        if of_class:
            write_lists(folder, of_class, {number: class_name})


def remove_old(corel: Path, data_dir: Path, found: FolderContents, done: dict[str, Prepared]) -> None:
    """Remove the prepared photos whose originals are gone or have another class now. Add a notice with their number.

    Only files that `prepare` has written are removed. A class folder from which all photos were removed goes too.

    Args:
        data_dir: the folder of the originals.
        done: file name -> Prepared, of this run and of earlier ones.
    """
    class_of = {photo.file_name: photo.class_number for photo in found.photos}
    # a photo that is only left out, for example because a package is missing, keeps its prepared file
    gone = {name for name in done if name not in class_of and name not in found.left_out and is_gone(data_dir / name)}
    known = {line.file_name for line in done.values()}
    for folder in (corel / "corel_all", *corel.glob("class_*")):
        number = re.fullmatch(r"class_(\d+)", folder.name)
        if not folder.is_dir() or not (number or folder.name == "corel_all"):
            continue
        kept = {
            line.file_name
            for name, line in done.items()
            if name not in gone and (not number or class_of.get(name, int(number[1])) == int(number[1]))
        }
        removed = [folder / name for name in known - kept if (folder / name).is_file()]
        for file in removed:
            file.unlink()
        if number and removed and not any((folder / name).is_file() for name in known):
            for name in LISTS:
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds files of the user
                folder.rmdir()
    if gone:
        lines = (json.dumps(asdict(line)) + "\n" for name, line in done.items() if name not in gone)
        write_text(corel / "prepared.jsonl", "".join(lines))
    if removed_photos := sum(not done[name].reason for name in gone):
        found.notices.append(f"{removed_photos} prepared photos were removed, because their originals are gone")


def is_gone(file: Path) -> bool:
    """Return whether a file does not exist. A file in a folder that cannot be read may exist."""
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def write_lists(folder: Path, rows: list[tuple[dict, str, int | None]], classes: dict[int, str]) -> None:
    """Write metadata.jsonl (the format of `datasets`), captions.json, split.json and classes.txt.

    Args:
        rows: the metadata, the split and the class number of each photo.
    """
    text = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values, _, _ in rows)
    write_text(folder / "metadata.jsonl", text)
    write_json(folder / "captions.json", {values["file_name"]: values["caption"] for values, _, _ in rows})
    splits = {name: [values["file_name"] for values, split, _ in rows if split == name] for name in SPLITS}
    write_json(folder / "split.json", {name: files for name, files in splits.items() if files or name != "test"})
    if classes:
        write_text(folder / "classes.txt", "".join(f"{number} {name}\n" for number, name in classes.items()))


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if links are not possible. Do nothing if it is one already."""
    if target.is_file() and (target.samefile(source) or target.read_bytes() == source.read_bytes()):
        return
    with atomic_file(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def draw_sheet(path: Path, folder: Path, found: FolderContents, photos: list[Photo], done: dict[str, Prepared]) -> None:
    """Draw the contact sheet: up to eight photos of each class, with the name of the class and its number of photos."""
    rows = {}
    for number in list(found.classes) or [None]:
        of_class = [photo for photo in photos if photo.class_number == number]
        shown = of_class[:: max(1, len(of_class) // 8)][:8]
        images = [open_photo(folder / done[photo.file_name].file_name) for photo in shown]
        for image in images:  # the photos of all classes in full size might not fit in memory
            image.thumbnail((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS)
        rows[f"{found.classes.get(number, 'photos')} ({len(of_class)})"] = images
    save_image(contact_sheet(rows), path)
