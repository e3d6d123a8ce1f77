"""Find out the layout of a folder and the classes of its photos from their names."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from corel_diffusers.data import corel5k
from corel_diffusers.data.folder_contents import SPLIT_FOLDERS, FolderContents
from corel_diffusers.data.tree import CLOSED_FORMATS, Tree, most_common_reasons, printable
from corel_diffusers.files import UserError

CAMERA_NAMES = {"img", "image", "dsc", "dscn", "dscf", "pxl", "photo", "picture", "p", "mvimg", "screenshot", "gopr"}


def layout_by_names(stems: Sequence[str], folder: Path) -> str:
    """Return corel, corel-1k, corel-5k or flat, from the file names without their endings.

    Names of one to three digits are read as flat, unless they reach from the first to the last class of Corel-1K.
    """
    if stems and sum(bool(re.fullmatch(r"\d{4}_\d+", s)) for s in stems) >= 0.9 * len(stems):
        return "corel"
    if (folder / "classes.txt").is_file() and any(re.fullmatch(r"\d+_\d+", s) for s in stems):
        return "corel"
    if corel5k.is_corel_5k(stems, folder):
        return "corel-5k"
    if stems and all(re.fullmatch(r"\d{1,3}", s) for s in stems):
        numbers = {int(s) for s in stems}
        if 0 in numbers and max(numbers) >= 900:
            return "corel-1k"
    return "flat"


def classes_of_folders(
    found: FolderContents,
    tree: Tree,
    places: dict[str, tuple[str, ...]],
    in_folders: list[str],
    class_names: dict[int, str],
) -> dict[str, int]:
    """Return file -> class number for photos in class folders, and set the classes.

    Raises:
        UserError: a class folder has photos, but none that this Pillow can open.
    """
    folders = sorted({places[file][0] for file in in_folders})
    if not_utf8 := [name for name in folders if printable(name) != name]:
        raise UserError(
            f"--data-dir {tree.folder}: the name of the folder {printable(not_utf8[0])} is not UTF-8: rename it"
        )
    class_numbers, found.classes = folder_classes(folders, class_names)
    closed = defaultdict(dict)
    for file, reason in tree.others.items():
        if reason in CLOSED_FORMATS.values() and "/" in file:
            closed[file.split("/")[-2]][file] = reason
    used = {part for place in places.values() for part in place[:-1]}
    if lost := next((name for name in closed if name not in used and name.lower() not in SPLIT_FOLDERS), None):
        raise UserError(
            f"--data-dir {tree.folder}: no photo of the class folder {lost} can be opened "
            f"({most_common_reasons(closed[lost])}). Or remove the folder, to train without this class"
        )
    nested = [file for file in in_folders if len(places[file]) > 2]
    if nested:
        example = printable("/".join(places[nested[0]][:-1]))
        found.notices.append(
            f"{len(nested)} photos lie deeper than their class folder, for example in {example}/: "
            "they get the class of that class folder"
        )
    return {file: class_numbers[places[file][0]] for file in in_folders}


def classes_of_names(
    found: FolderContents, files: list[str], class_names: dict[int, str], root: Path
) -> dict[str, int | None]:
    """Return file -> class number for a layout in which file names contain the class, and set the classes.

    In the layout flat all numbers are None. Files whose name does not match the layout are left out.
    """
    stems = {file: Path(file).stem for file in files}
    numbers: dict[str, int | None] = {}
    if found.layout == "flat":
        offer_layouts(found, list(stems.values()))
        return dict.fromkeys(files)
    if found.layout == "names":
        words = {file: word_of(stem) for file, stem in stems.items()}
        word_numbers, found.classes = label_numbers(sorted({word for word in words.values() if word}), class_names)
        numbers = {file: word_numbers[word] for file, word in words.items() if word}
    else:
        pattern, divisor = {
            "corel": (r"(\d+)_\d+", 1),
            "corel-1k": (r"(\d{1,3})", 100),
            "corel-5k": (r"([1-9]\d{3,5})", 1000),
        }[found.layout]
        matches = {file: re.fullmatch(pattern, stem) for file, stem in stems.items()}
        numbers = {file: int(match[1]) // divisor for file, match in matches.items() if match}
        present = sorted(set(numbers.values()))
        if found.layout == "corel-5k":
            class_names = names_from_words(numbers, corel5k.read_words(root)) | class_names
        found.classes = {number: class_names.get(number, str(number)) for number in present}
        if unnamed := [str(number) for number in present if number not in class_names]:
            found.notices.append(
                f"classes.txt has no name for class {', '.join(unnamed)}: the number is used as the name"
            )
    for file in files:
        if file not in numbers:
            found.left_out[file] = f"its name does not match the {found.layout} layout"
    if found.layout == "corel-1k":
        found.notices.append(
            "file names are numbers from 0 to 999: read as Corel-1K, class = number // 100 "
            "(if the photos have no classes: corel-diffusers prepare --layout flat)"
        )
    return numbers


def names_from_words(numbers: dict[str, int], words: dict[str, list[str]]) -> dict[int, str]:
    """Return the names of the classes of Corel-5K; empty without words. numbers: file -> class number."""
    words_of_disc = defaultdict(list)
    for file, number in numbers.items():
        words_of_disc[number].append(words.get(Path(file).stem, []))
    return {number: name for number, name in corel5k.class_names(words_of_disc).items() if name} if words else {}


def offer_layouts(found: FolderContents, stems: list[str]) -> None:
    """Add a notice if the names of flat photos may contain classes."""
    words = Counter(map(word_of, stems))
    if 2 <= len(words) <= 50 and min(words.values()) > 1 and not {word.lower() for word in words} & {"", *CAMERA_NAMES}:
        shown = ", ".join(sorted(words)[:5])
        found.notices.append(
            f"file names begin with {len(words)} words ({shown}{', …' if len(words) > 5 else ''}): "
            "if these are classes, give corel-diffusers prepare --layout names"
        )
    elif stems and all(re.fullmatch(r"\d{1,3}", stem) for stem in stems) and len({len(stem) for stem in stems}) > 1:
        found.notices.append(
            "file names are numbers: read as photos without classes (for the photos of Corel-1K see prepare --layout)"
        )


def word_of(stem: str) -> str:
    """Return what stands before the number at the end of a name: "cat" for "cat_01" and "cat (2)"."""
    match = re.fullmatch(r"(.*?[^\W\d_])[\s_.-]*\(?\d+\)?", stem)
    return match[1] if match else ""


def folder_classes(folders: Sequence[str], named: dict[int, str]) -> tuple[dict[str, int], dict[int, str]]:
    """Return two mappings: class folder -> class number, and class number -> class name, in the order of the numbers.

    If all folders have names such as `class_0003` or `3`, the class number is the number in the name, here 3. The class
    name comes from classes.txt, or is the name of the folder if classes.txt does not have the number.

    Otherwise the name of the folder is the class name. Its number comes from classes.txt if classes.txt lists
    all folders. Otherwise the sorted folders are numbered from 1.

    Args:
        named: class number -> class name, from classes.txt.
    """
    matches = {folder: re.fullmatch(r"(?:class_)?(\d+)", folder) for folder in folders}
    if all(matches.values()) and len({int(match[1]) for match in matches.values()}) == len(folders):
        numbers = {folder: int(match[1]) for folder, match in matches.items()}
        by_number = sorted(numbers.items(), key=lambda item: item[1])
        classes = {number: named.get(number, folder) for folder, number in by_number}
        if len(set(classes.values())) < len(classes):  # classes.txt gives one folder the name of another
            classes = {number: folder for folder, number in by_number}
        return numbers, classes
    number_of = {name: number for number, name in named.items()}
    all_listed = set(folders) <= set(number_of)
    numbers = {
        folder: number_of[folder] if all_listed else position for position, folder in enumerate(sorted(folders), 1)
    }
    return numbers, {number: folder for folder, number in sorted(numbers.items(), key=lambda item: item[1])}


def label_numbers(labels: Sequence[str], named: dict[int, str]) -> tuple[dict[str, int], dict[int, str]]:
    """Return label -> class number, and class number -> name.

    A label is the name of a class of classes.txt, or the number of a class. Otherwise the labels are numbered from 1.
    """
    if set(labels) <= set(named.values()):
        numbers = {name: number for number, name in named.items() if name in labels}
        return numbers, {number: name for name, number in numbers.items()}
    if all(label.isdecimal() for label in labels) and len({int(label) for label in labels}) == len(labels):
        numbers = {label: int(label) for label in sorted(labels, key=int)}
        return numbers, {number: named.get(number, label) for label, number in numbers.items()}
    return {label: i for i, label in enumerate(labels, 1)}, dict(enumerate(labels, 1))
