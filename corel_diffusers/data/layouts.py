"""Find out the layout of a folder and the classes of its photos from their names."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from corel_diffusers.data import corel5k
from corel_diffusers.data.folder_contents import FolderContents
from corel_diffusers.data.tree import most_common_reasons
from corel_diffusers.files import UserError, printable

CAMERA_NAMES = {"img", "image", "dsc", "dscn", "dscf", "pxl", "photo", "picture", "p", "mvimg", "screenshot", "gopr"}
LAYOUT_NAMES = {"corel": "raw Corel", "corel-1k": "Corel-1K", "corel-5k": "Corel-5K"}
# layout -> the pattern of its names without their ending; the number in it is divided by the second value
NUMBERED = {"corel": (r"(\d+)_\d+", 1), "corel-1k": (r"(\d{1,3})", 100), "corel-5k": (corel5k.NAME, 1000)}


def layout_by_names(stems: Sequence[str], folder: Path) -> str:
    """Return corel, corel-1k, corel-5k or flat, from the file names without their endings.

    Without classes.txt, names that begin with a year, such as 2019_0007, are read as flat. Names of one to three digits
    are read as flat, unless they reach from the first to the last class of Corel-1K.
    """
    corel_names = [stem for stem in stems if re.fullmatch(r"\d{4}_\d+", stem)]
    are_years = all(1900 <= int(stem[:4]) <= 2099 for stem in corel_names)
    if stems and len(corel_names) >= 0.9 * len(stems) and not are_years:
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
    found: FolderContents, folder_of: dict[str, str], closed: dict[str, str], named: dict[int, str]
) -> dict[str, int]:
    """Return file -> class number for photos in class folders, and set the classes.

    Args:
        folder_of: file -> class folder, of the photos and of the closed photos.
        closed: photos that this Pillow cannot open -> what to do.
        named: class number -> class name, from classes.txt.

    Raises:
        UserError: a class folder has photos, but none that can be opened.
    """
    open_folders = {folder for file, folder in folder_of.items() if file not in closed}
    if lost := sorted(set(folder_of.values()) - open_folders):
        reasons = most_common_reasons({file: closed[file] for file, folder in folder_of.items() if folder == lost[0]})
        raise UserError(
            f"no photo of the class folder {lost[0]} can be opened ({reasons}). "
            "Or remove the folder, to train without this class"
        )
    numbers, found.classes = number_classes(open_folders, named)
    return {file: numbers[folder] for file, folder in folder_of.items() if file not in closed}


def classes_of_names(
    found: FolderContents, files: Iterable[str], named: dict[int, str], words: dict[str, list[str]]
) -> dict[str, int | None]:
    """Return file -> class number for a layout in which file names contain the class, and set the classes.

    In the layout flat all numbers are None. Files whose name does not match the layout are left out.

    Args:
        named: class number -> class name, from classes.txt.
        words: the words of the photos of Corel-5K.
    """
    stems = {file: Path(file).stem for file in files}
    if found.layout == "flat":
        offer_layouts(found, list(stems.values()))
        return dict.fromkeys(stems)
    if found.layout == "names":
        word_of_file = {file: word for file, stem in stems.items() if (word := word_of(stem))}
        word_numbers, found.classes = number_classes(set(word_of_file.values()), named)
        numbers = {file: word_numbers[word] for file, word in word_of_file.items()}
    else:
        pattern, divisor = NUMBERED[found.layout]
        matches = {file: re.fullmatch(pattern, stem) for file, stem in stems.items()}
        numbers = {file: int(match[1]) // divisor for file, match in matches.items() if match}
        named = names_from_words(numbers, words) | named
        found.classes = {number: named.get(number, str(number)) for number in sorted(set(numbers.values()))}
        if unnamed := [str(number) for number in found.classes if number not in named]:
            found.notices.append(
                f"classes.txt has no name for class {', '.join(unnamed)}, or is not there: the number is used as the "
                f"name (read as {LAYOUT_NAMES[found.layout]}; if the photos have no classes, train the UNet with "
                "--unconditional, or prepare them with --layout flat)"
            )
    found.left_out |= dict.fromkeys(stems.keys() - numbers.keys(), f"its name does not match the {found.layout} layout")
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
    elif stems and all(re.fullmatch(r"(19|20)\d\d_\d+", stem) for stem in stems):
        found.notices.append(
            "file names begin with years: read as photos without classes (if they are class numbers of Corel, give "
            "prepare --layout corel)"
        )
    elif stems and all(re.fullmatch(r"\d{1,3}", stem) for stem in stems) and len({len(stem) for stem in stems}) > 1:
        found.notices.append(
            "file names are numbers: read as photos without classes (for the photos of Corel-1K see prepare --layout)"
        )


def word_of(stem: str) -> str:
    """Return what stands before the number at the end of a name: "cat" for "cat_01" and "cat (2)"."""
    match = re.fullmatch(r"(.*?[^\W\d_])[\s_.-]*\(?\d+\)?", stem)
    return match[1] if match else ""


def require_class_names(classes: dict[int, str], source: object) -> None:
    """Raise UserError for a class name with a control character: classes.txt and screens show one name per line."""
    for name in classes.values():
        if name != printable(name):
            raise UserError(f"{source}: the class name {name!a} has a control character: rename the class")


def number_classes(labels: Iterable[str], named: dict[int, str]) -> tuple[dict[str, int], dict[int, str]]:
    """Return label -> class number, and class number -> class name in the order of the numbers.

    A label, which can be the name of a class folder, has the number of classes.txt if all labels are names in it. If
    all labels are numbers, such as `3` or `class_0003`, these are the class numbers, and classes.txt can name them.
    Otherwise the sorted labels are numbered from 1.

    Args:
        named: class number -> class name, from classes.txt.
    """
    labels = sorted(labels)
    if set(labels) <= set(named.values()):
        return {name: n for n, name in named.items() if name in labels}, {
            n: named[n] for n in sorted(named) if named[n] in labels
        }
    matches = {label: re.fullmatch(r"(?:class_)?(\d+)", label) for label in labels}
    numbers = {label: int(match[1]) for label, match in matches.items() if match}
    if len(set(numbers.values())) < len(labels):  # not all are numbers, or "1" and "01" are both there
        return {label: n for n, label in enumerate(labels, 1)}, dict(enumerate(labels, 1))
    label_of = {n: label for label, n in sorted(numbers.items(), key=lambda item: item[1])}
    classes = {n: named.get(n, label) for n, label in label_of.items()}
    return numbers, classes if len(set(classes.values())) == len(classes) else label_of
