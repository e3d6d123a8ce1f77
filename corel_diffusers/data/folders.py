"""Read a folder of photos: its layout, its classes and its captions. No photo is opened."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corel_diffusers.files import UserError, read_json

PHOTO_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FOLDER_FILES = {"classes.txt", "captions.json", "metadata.jsonl", "split.json", "skipped.json"}
SHEET = "corel_dataset_samples.png"  # the contact sheet that `prepare` draws


@dataclass
class Photo:
    """One photo of a folder. `class_number` is None if the layout of the folder has no classes."""

    path: Path
    file_name: str
    class_number: int | None = None
    caption: str | None = None


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


def find_photos(folder: Path, layout: str = "auto") -> FolderContents:
    """List the photos of a folder without opening them.

    Args:
        layout: `corel` (0002_0017.png belongs to class 2; classes.txt has the class names), `corel-1k` (0.jpg to
            999.jpg, class = number // 100), `folders` (one folder per class), `flat` (no classes). `auto` chooses by
            the file names.

    Raises:
        UserError: the folder has no photo, or classes.txt or captions.json cannot be read.
    """
    files, folders = visible_files(folder), [d for d in visible_folders(folder) if not is_toolkit_output(d)]
    photo_files = [f for f in files if is_named_photo(f)]
    files_in = {d: visible_files(d) for d in folders}
    class_folders = {
        d: inside for d, all_files in files_in.items() if (inside := [f for f in all_files if is_named_photo(f)])
    }
    if layout == "auto":
        layout = layout_by_names([f.stem for f in photo_files], folder)
        if layout == "flat" and sum(map(len, class_folders.values())) > len(photo_files):
            layout = "folders"
    found = FolderContents(layout, [], {}, {printable(f.name): why_left_out(f) for f in files if not is_named_photo(f)})
    if not (class_folders if layout == "folders" else photo_files):
        raise UserError(f"No images found in {folder}: looked for {' '.join(PHOTO_ENDINGS)}; check --data-dir")
    captions = read_captions(folder / "captions.json")
    class_names = read_classes(folder / "classes.txt")
    if layout == "folders":
        add_class_folders(found, folder, files_in, class_folders, captions, class_names)
        if photo_files:
            found.notices.append(f"{len(photo_files)} photos outside the class folders are left out")
        return found
    add_files(found, photo_files, captions, class_names)
    if class_folders:
        found.notices.append(f"{len(class_folders)} folders with photos inside {folder.name} are left out")
    return found


def add_class_folders(
    found: FolderContents,
    folder: Path,
    files_in: dict[Path, list[Path]],
    class_folders: dict[Path, list[Path]],
    captions: dict[str, str],
    class_names: dict[int, str],
) -> None:
    """Add the photos of class folders, and the reasons for the files that are left out.

    Args:
        files_in: all files of each subfolder.
        class_folders: the photos of each subfolder that has some.
    """
    if not_utf8 := [d for d in class_folders if not is_utf8(d.name)]:
        raise UserError(
            f"--data-dir {folder}: the name of the folder {printable(not_utf8[0].name)} is not UTF-8: rename it"
        )
    class_numbers, found.classes = folder_classes([d.name for d in class_folders], class_names)
    # A folder in which no name is UTF-8 is not a class folder. Report its files: no class may disappear silently.
    for directory, all_files in files_in.items():
        invalid = [
            f for f in all_files if not is_named_photo(f) and (directory in class_folders or not is_utf8(f.name))
        ]
        found.left_out |= {f"{printable(directory.name)}/{printable(f.name)}": why_left_out(f) for f in invalid}
    for directory, inside in class_folders.items():
        folder_captions = read_captions(directory / "captions.json")
        for file in inside:
            name = f"{directory.name}/{file.name}"
            caption = captions.get(name) or folder_captions.get(file.name)
            found.photos.append(Photo(file, name, class_numbers[directory.name], caption))
    nested = (inside for d in files_in for inside in visible_folders(d))
    if example := next((d for d in nested if any(is_named_photo(f) for f in d.rglob("*"))), None):
        found.notices.append(
            f"photos in nested folders are left out, for example in {printable(str(example.relative_to(folder)))}/"
        )


def add_files(
    found: FolderContents, photo_files: list[Path], captions: dict[str, str], class_names: dict[int, str]
) -> None:
    """Add photos that lie in one folder. In the layouts corel and corel-1k, their names contain the class."""
    for file in photo_files:
        class_number = None
        if found.layout != "flat":
            match = re.fullmatch(r"(\d+)_\d+" if found.layout == "corel" else r"(\d{1,3})", file.stem)
            if not match:
                found.left_out[file.name] = f"its name does not match the {found.layout} layout"
                continue
            class_number = int(match[1]) // (1 if found.layout == "corel" else 100)
        found.photos.append(Photo(file, file.name, class_number, captions.get(file.name)))
    if found.layout == "corel-1k":
        found.notices.append(
            "file names are numbers from 0 to 999: read as Corel-1K, class = number // 100 "
            "(if the photos have no classes: corel-diffusers prepare --layout flat)"
        )
    present = sorted({p.class_number for p in found.photos if p.class_number is not None})
    found.classes = {n: class_names.get(n, str(n)) for n in present}
    if unnamed := [str(n) for n in present if n not in class_names]:
        found.notices.append(f"classes.txt has no name for class {', '.join(unnamed)}: the number is used as the name")


def is_named_photo(file: Path) -> bool:
    """Return whether a file has a photo's ending and a UTF-8 name."""
    return file.suffix.lower() in PHOTO_ENDINGS and is_utf8(file.name)


def is_utf8(name: str) -> bool:
    """Return whether a file name is valid UTF-8. Linux allows other names; archives from other systems contain them."""
    return printable(name) == name


def printable(name: str) -> str:
    """Return a file name with each byte that is not UTF-8 replaced by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def visible_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder, sorted by name, without hidden files and FOLDER_FILES."""
    return sorted(
        f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".") and f.name not in FOLDER_FILES
    )


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted by name, without hidden folders."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def is_toolkit_output(folder: Path) -> bool:
    """Return whether this toolkit wrote the folder: a run, a contact sheet, or output of `prepare` or `generate`."""
    markers = ("run.json", "model_index.json", SHEET, "corel/source.json")
    return folder.name.endswith("_individual") or any((folder / marker).exists() for marker in markers)


def why_left_out(file: Path) -> str:
    return f"not an image ({file.suffix or 'no ending'})" if is_utf8(file.name) else "its name is not UTF-8: rename it"


def layout_by_names(stems: Sequence[str], folder: Path) -> str:
    """Return corel, corel-1k or flat, from the file names without their endings.

    Names that are the numbers 1 to n without a gap are a user's own flat photos: the numbers of Corel-1K start at 0.
    """
    if stems and sum(bool(re.fullmatch(r"\d{4}_\d+", s)) for s in stems) >= 0.9 * len(stems):
        return "corel"
    if (folder / "classes.txt").is_file() and any(re.fullmatch(r"\d+_\d+", s) for s in stems):
        return "corel"
    if stems and all(re.fullmatch(r"\d{1,3}", s) for s in stems):
        numbers = {int(s) for s in stems}
        if numbers != set(range(1, len(numbers) + 1)):
            return "corel-1k"
    return "flat"


def folder_classes(folders: Sequence[str], named: dict[int, str]) -> tuple[dict[str, int], dict[int, str]]:
    """Return two mappings: class folder -> class number, and class number -> class name.

    If all folders have names such as `class_0003`, the class number is the number in the name, here 3. The class name
    comes from classes.txt, or is the name of the folder if classes.txt does not have the number.

    Otherwise the name of the folder is the class name. Its number comes from classes.txt if classes.txt lists
    all folders. Otherwise the sorted folders are numbered from 1.

    Args:
        named: class number -> class name, from classes.txt.
    """
    matches = {folder: re.fullmatch(r"class_(\d+)", folder) for folder in folders}
    if all(matches.values()):
        numbers = {folder: int(match[1]) for folder, match in matches.items()}
        return numbers, {number: named.get(number, folder) for folder, number in numbers.items()}
    number_of = {name: number for number, name in named.items()}
    all_listed = set(folders) <= set(number_of)
    numbers = {
        folder: number_of[folder] if all_listed else position for position, folder in enumerate(sorted(folders), 1)
    }
    return numbers, {number: folder for folder, number in sorted(numbers.items(), key=lambda item: item[1])}


def read_classes(file: Path) -> dict[int, str]:
    """Read classes.txt (one `<number> <name>` per line) as class number -> name; empty if there is no such file."""
    if not file.is_file():
        return {}
    classes, lines = {}, file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        number, _, name = line.strip().partition(" ")
        if not number.isdigit() or not name.strip():
            raise UserError(f"{file} line {line_number}: {line.strip()!r} is not '<number> <name>'")
        classes[int(number)] = name.strip()
    if len(set(classes.values())) < len(classes):
        raise UserError(f"{file}: two classes have the same name: give each class its own name")
    return classes


def read_captions(file: Path) -> dict[str, str]:
    """Read captions.json, file name -> caption; empty if there is no such file."""
    captions = read_json(file) if file.is_file() else {}
    if not isinstance(captions, dict) or not all(isinstance(c, str) for c in captions.values()):
        raise UserError(f"{file}: expected one object {{file name: caption}}")
    return captions


def default_caption(class_name: str | None) -> str:
    return f"a photo of a {class_name}" if class_name else "a photo"
