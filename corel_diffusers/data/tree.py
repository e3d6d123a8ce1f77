"""List the files of a folder and of all folders inside it. No file is opened."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from corel_diffusers.config.checks import ARCHIVE_ENDINGS
from corel_diffusers.files import UserError, printable

# The formats that Pillow opens as one image of photos. Others, such as icons and documents, are not photos.
FORMATS = {
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PCX"),
    *("PNG", "PPM", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP"),
}
# endings of photos that this Pillow cannot open, and what to do about them
CLOSED_FORMATS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "a HEIC photo: pip install pillow-heif"),
    ".avif": "an AVIF photo: install Pillow 11.3 or newer",
    **dict.fromkeys(
        (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "a raw photo of a camera: convert it to JPEG"
    ),
}
FOLDER_FILES = {"classes.txt", "split.json", "skipped.json", "words", "training_label"}
METADATA_FILES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
# files and folders of systems
IGNORED = {
    *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "desktop.ini"),
}
SHEET = "corel_dataset_samples.png"  # the contact sheet that `prepare` draws
RUN_FILES = ("run.json", "model_index.json", SHEET)
MISSING_TARGET = "a link to a missing file"
BAD_NAME = "has bytes that are not UTF-8, or control characters: rename it"


@dataclass
class Tree:
    """The files of a folder and of all folders inside it.

    Paths are relative, with "/" between their parts and names in composed Unicode (NFC). They are sorted.
    """

    folder: Path
    photos: dict[str, Path] = field(default_factory=dict)  # relative path -> path on disk
    closed: dict[str, str] = field(default_factory=dict)  # photos that this Pillow cannot open -> what to do
    others: dict[str, str] = field(default_factory=dict)  # other files -> why they are not photos
    metadata: dict[str, Path] = field(default_factory=dict)  # metadata files -> path on disk
    captions: dict[str, Path] = field(default_factory=dict)  # captions.json -> path on disk
    notices: list[str] = field(default_factory=list)


def photo_endings() -> tuple[str, ...]:
    """Return the endings of the photos that the installed Pillow opens, sorted."""
    register_heif()
    Image.init()
    # Pillow opens MPO, of cameras with two lenses, as JPEG
    opened = {name for name in FORMATS if name in Image.OPEN or (name == "MPO" and "JPEG" in Image.OPEN)}
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in opened))


@cache
def register_heif() -> None:
    """Let Pillow open HEIC photos, if the package pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def list_tree(folder: Path, flag: str = "--data-dir") -> Tree:
    """List a folder and all folders inside it.

    Hidden files, FOLDER_FILES and folders that this toolkit wrote are left out. A folder that cannot be read, and a
    link to a folder that is read already, give a notice.

    Args:
        flag: the flag that names the folder, for messages.

    Raises:
        UserError: the folder cannot be read, or the name of a folder with photos has bytes that are not UTF-8 or
            control characters.
    """
    tree, endings, seen = Tree(folder), photo_endings(), set()
    folders, links = [(folder, "")], []  # links come last, so that a photo gets the name of its real folder
    while folders or links:
        directory, prefix = folders.pop() if folders else links.pop(0)
        if (place := os.path.realpath(directory)) in seen:
            tree.notices.append(f"{printable(prefix)} is a link to a folder that is read already: it is left out")
            continue
        seen.add(place)
        try:
            with os.scandir(directory) as listed:
                entries = list(listed)
            is_written_here = bool(prefix) and is_toolkit_output(directory)
        except OSError as error:
            if not prefix:
                reason = f"{flag} {folder} cannot be read ({error.strerror})"
                raise UserError(f"{reason}: check its permissions") from None
            tree.notices.append(f"the folder {printable(prefix)} cannot be read ({error.strerror}): it is left out")
            continue
        if is_written_here:
            tree.notices.append(f"the folder {printable(prefix)} was written by this toolkit: it is left out")
            continue
        for entry in entries:
            name = unicodedata.normalize("NFC", entry.name)
            if name.startswith(".") or name.lower() in IGNORED:
                continue
            if is_true(entry.is_dir):
                (links if entry.is_symlink() else folders).append((Path(entry.path), f"{prefix}{name}/"))
            else:
                add_file(tree, entry, prefix + name, endings)
        if printable(prefix) != prefix and any(file.startswith(prefix) for file in tree.photos):
            raise UserError(f"{flag} {folder}: the name of the folder {printable(prefix)} {BAD_NAME}")
    for part in (tree.photos, tree.closed, tree.others):
        ordered = sorted(part.items())
        part.clear()
        part.update(ordered)
    if broken := list(tree.others.values()).count(MISSING_TARGET):
        tree.notices.append(
            f"{broken} photos are links to files that are not here, as git annex and DVC make them: fetch them"
        )
    return tree


def add_file(tree: Tree, entry: os.DirEntry, relative: str, endings: tuple[str, ...]) -> None:
    """Add a file to the part of the tree that it belongs to. endings: see `photo_endings`."""
    name = relative.rsplit("/", 1)[-1]
    ending = os.path.splitext(name)[1].lower()
    if name in FOLDER_FILES:
        return
    if name in METADATA_FILES:
        tree.metadata[relative] = Path(entry.path)
    elif name == "captions.json":
        tree.captions[relative] = Path(entry.path)
    elif printable(name) != name:
        tree.others[printable(relative)] = f"its name {BAD_NAME}"
    elif ending in endings and not is_true(entry.is_file):
        tree.others[printable(relative)] = MISSING_TARGET if entry.is_symlink() else "not a file"
    elif ending in endings and relative in tree.photos:
        tree.others[relative] = "another photo has the same name in another form of Unicode"
    elif ending in endings:
        tree.photos[relative] = Path(entry.path)
    elif ending in CLOSED_FORMATS:
        tree.closed[printable(relative)] = CLOSED_FORMATS[ending]
    elif ending in ARCHIVE_ENDINGS:
        tree.others[printable(relative)] = f"an archive ({ending}): unpack it"
    else:
        tree.others[printable(relative)] = f"not an image ({ending or 'no ending'})"


def is_true(test: Callable[[], bool]) -> bool:
    """Return the result of a test of a file: False if the file cannot be reached, such as a link to itself."""
    try:
        return test()
    except OSError:
        return False


def is_toolkit_output(folder: Path) -> bool:
    """Return whether this toolkit wrote the folder: a run, a contact sheet, or output of `prepare` or `generate`."""
    if folder.name.endswith("_individual") or is_prepared(folder) or is_prepared(folder / "corel"):
        return True
    return any((folder / name).exists() for name in RUN_FILES)


def is_prepared(corel: Path) -> bool:
    """Return whether `prepare` wrote the folder corel/."""
    return (corel / "source.json").is_file() and (corel / "corel_all").is_dir()


def most_common_reasons(reasons: dict[str, str], count: int = 3) -> str:
    """Return the most common reasons with their numbers, such as "5 damaged, 1 not an image (.txt)"."""
    return ", ".join(f"{number} {reason}" for reason, number in Counter(reasons.values()).most_common(count))
