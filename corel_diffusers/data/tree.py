"""List the files of a folder and of all folders inside it. No file is opened."""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from corel_diffusers.config.checks import ARCHIVE_ENDINGS
from corel_diffusers.files import UserError

# The formats that Pillow opens as one image of photos. Others, such as icons and documents, are not photos.
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "SUN"}
FORMATS |= {"TGA", "TIFF", "WEBP"}
# photos that this Pillow cannot open, and what to do about it
CLOSED_FORMATS = dict.fromkeys((".heic", ".heif", ".hif"), "a HEIC photo: pip install pillow-heif")
CLOSED_FORMATS |= dict.fromkeys((".avif",), "an AVIF photo: install Pillow 11.3 or newer")
CLOSED_FORMATS |= dict.fromkeys(
    (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "a raw photo of a camera: convert it to JPEG"
)
FOLDER_FILES = {"classes.txt", "captions.json", "split.json", "skipped.json", "words", "training_label"}
METADATA_FILES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
IGNORED = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
IGNORED |= {"thumbs.db", "desktop.ini"}
SHEET = "corel_dataset_samples.png"  # the contact sheet that `prepare` draws
RUN_MARKERS = ("run.json", "model_index.json", SHEET, "corel/source.json")


@dataclass
class Tree:
    """The files of a folder. Their paths are relative and use "/". Composed Unicode stands for decomposed Unicode."""

    folder: Path
    photos: dict[str, Path] = field(default_factory=dict)  # relative path -> path on disk
    others: dict[str, str] = field(default_factory=dict)  # relative path -> why it is not a photo
    metadata: dict[str, Path] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def photo_endings() -> tuple[str, ...]:
    """Return the endings of the photos that the installed Pillow opens, sorted."""
    register_heif()
    Image.init()
    known = Image.registered_extensions().items()
    return tuple(sorted(ending for ending, name in known if name in FORMATS and name in Image.OPEN))


def register_heif() -> None:
    """Let Pillow open HEIC photos, if the package pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def list_tree(folder: Path) -> Tree:
    """List a folder and all folders inside it, sorted by path.

    Hidden files, FOLDER_FILES and folders that this toolkit wrote are left out. A folder that cannot be read gives a
    notice.
    """
    tree, endings, seen, broken_links = Tree(folder), photo_endings(), set(), 0

    def walk(directory: Path, prefix: str) -> None:
        nonlocal broken_links
        try:
            with os.scandir(directory) as listed:
                entries = sorted(listed, key=lambda entry: (entry.is_symlink(), entry.name))  # links last
            written_here = bool(prefix) and is_toolkit_output(directory)
        except OSError as error:
            if directory == folder:
                raise UserError(
                    f"--data-dir {folder} cannot be read ({error.strerror}): check its permissions"
                ) from None
            tree.notices.append(f"the folder {printable(prefix)} cannot be read ({error.strerror}): it is left out")
            return
        if written_here:
            tree.notices.append(f"the folder {printable(prefix)} was written by this toolkit: it is left out")
            return
        for entry in entries:
            name = unicodedata.normalize("NFC", entry.name)
            if name.startswith(".") or name.lower() in IGNORED:
                continue
            path, relative = Path(entry.path), prefix + name
            if os.path.isdir(path):
                place = os.path.realpath(path)
                if place not in seen:  # a link can lead back to a folder above it
                    seen.add(place)
                    walk(path, f"{relative}/")
                elif entry.is_symlink():
                    tree.notices.append(f"the link {printable(relative)} leads to a folder that is read already")
            elif not os.path.isfile(path):
                broken_links += entry.is_symlink()
                tree.others[printable(relative)] = "a link to a missing file"
            elif name in METADATA_FILES:
                tree.metadata[relative] = path
            elif name not in FOLDER_FILES:
                reason = why_left_out(name, endings)
                if relative in tree.photos:
                    reason = "another photo has the same name in another form of Unicode"
                if reason:
                    tree.others[printable(relative)] = reason
                else:
                    tree.photos[relative] = path

    seen.add(os.path.realpath(folder))
    walk(folder, "")
    if bad := next((file for file in tree.photos if printable(file) != file), None):
        name = printable(bad.rpartition("/")[0])
        raise UserError(f"--data-dir {printable(str(folder))}: the name of the folder {name} is not UTF-8: rename it")
    if broken_links:
        tree.notices.append(
            f"{broken_links} photos are links to files that are not here, as git annex and DVC make them: fetch them"
        )
    return tree


def why_left_out(name: str, endings: tuple[str, ...]) -> str:
    """Return the reason why a file is not listed as a photo, or "" if it is one."""
    ending = Path(name).suffix.lower()
    if printable(name) != name:
        return "its name is not UTF-8: rename it"
    if ending in endings:
        return ""
    if ending in ARCHIVE_ENDINGS:
        return f"an archive ({ending}): unpack it"
    return CLOSED_FORMATS.get(ending, f"not an image ({ending or 'no ending'})")


def printable(name: str) -> str:
    """Return a file name with each byte that is not UTF-8 replaced by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def is_toolkit_output(folder: Path) -> bool:
    """Return whether this toolkit wrote the folder: a run, a contact sheet, or output of `prepare` or `generate`."""
    if folder.name.endswith("_individual"):
        return True
    return any((folder / marker).exists() for marker in RUN_MARKERS) or (
        (folder / "source.json").is_file() and (folder / "corel_all").is_dir()
    )


def most_common_reasons(others: dict[str, str], count: int = 3) -> str:
    """Return the most common reasons with their numbers, such as "5 a HEIC photo: ..., 1 not an image (.txt)"."""
    return ", ".join(f"{number} {reason}" for reason, number in Counter(others.values()).most_common(count))
