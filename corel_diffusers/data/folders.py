"""Read a folder of photos: its layout, its classes, its splits and its captions. No photo is opened."""

import re
from functools import lru_cache
from pathlib import Path

from corel_diffusers.data import corel5k
from corel_diffusers.data.folder_contents import SPLIT_FOLDERS, FolderContents, Photo
from corel_diffusers.data.folder_files import read_captions, read_classes, read_split
from corel_diffusers.data.layouts import classes_of_folders, classes_of_names, label_numbers, layout_by_names
from corel_diffusers.data.metadata import Row, read_metadata
from corel_diffusers.data.tree import Tree, list_tree, most_common_reasons, printable
from corel_diffusers.files import UserError

CAMERA_FOLDER = (
    r"\d{3}[A-Z0-9_]{5}"  # cameras begin a new folder, such as 100CANON, after some photos: it is not a class
)


def find_photos(folder: Path, layout: str = "auto") -> FolderContents:
    """List the photos of a folder, and of the folders inside it, without opening them.

    Args:
        layout: `corel` (0002_0017.png belongs to class 2; classes.txt has the class names), `corel-1k` (0.jpg to
            999.jpg, class = number // 100), `corel-5k` (1000.jpeg to 384096.jpeg, class = number // 1000), `folders`
            (one folder per class), `names` (cat_01.jpg belongs to class cat), `flat` (no classes). `auto` chooses by
            the names, and reads metadata files if there are any. Each layout can lie in the folders train, val and
            test.

    Raises:
        UserError: the folder has no photo, or classes.txt, captions.json or a metadata file cannot be read.
    """
    prepared = prepared_folder_inside(folder)
    tree = list_tree(prepared or folder)
    if prepared:
        tree.notices.append(f"{folder} was written by `prepare`: the photos are read from {prepared}")
    if layout == "auto" and tree.metadata:
        return read_rows_of_photos(tree)
    if not tree.photos:
        seen = f"; it has {most_common_reasons(tree.others)}" if tree.others else ""
        raise UserError(
            f"No images found in {folder}: looked for .png .jpg .jpeg .webp .tif .gif and other endings that Pillow "
            f"opens{seen}; check --data-dir"
        )
    base, splits, places = split_and_place(tree)
    found = FolderContents(layout, [], {}, dict(tree.others), tree.notices)
    if base:
        found.notices.append(f"the photos are read from {printable(base)}")
    root = tree.folder / base
    in_folders = [file for file, parts in places.items() if len(parts) > 1]
    loose = [file for file in places if file not in set(in_folders)]
    names_of_folders = {places[file][0] for file in in_folders}
    from_camera = in_folders and all(any(map(is_camera_folder, places[file][:-1])) for file in in_folders)
    if layout == "auto":
        found.layout = layout_by_names([Path(file).stem for file in loose], root)
        if found.layout == "flat" and len(in_folders) > len(loose) and not from_camera:
            found.layout = "folders"
    class_names, captions = read_classes(root / "classes.txt", found), read_captions(root / "captions.json")
    if found.layout == "folders":
        class_of = classes_of_folders(found, tree, places, in_folders, class_names)
        if loose:
            found.notices.append(f"{len(loose)} photos outside the class folders are left out")
    else:
        class_of = classes_of_names(found, loose + (in_folders if from_camera else []), class_names, root)
        if in_folders and not from_camera:
            found.notices.append(f"{len(names_of_folders)} folders with photos inside {root.name} are left out")
    words = corel5k.read_words(root) if found.layout == "corel-5k" else {}
    captions_in = lru_cache(maxsize=None)(lambda folder: read_captions(folder / "captions.json"))
    for file in sorted(class_of):
        place = "/".join(places[file])
        caption = captions.get(place) or captions_in(tree.photos[file].parent).get(Path(file).name)
        caption = caption or ", ".join(words.get(Path(file).stem, [])) or None
        found.photos.append(Photo(tree.photos[file], file, class_of[file], caption, splits.get(file)))
    return found


def is_camera_folder(name: str) -> bool:
    """Return whether a camera made the folder. It is not a class."""
    return name == "DCIM" or bool(re.fullmatch(CAMERA_FOLDER, name))


def prepared_folder_inside(folder: Path) -> Path | None:
    """Return corel_all/ of `prepare`, if the folder is training_data/ or training_data/corel/, otherwise None."""
    for corel in (folder, folder / "corel"):
        if (corel / "source.json").is_file() and (corel / "corel_all").is_dir():
            return corel / "corel_all"
    return None


def split_and_place(tree: Tree) -> tuple[str, dict[str, str], dict[str, tuple[str, ...]]]:
    """Return the folder that contains all photos, the split of each photo, and its path without both.

    Returns:
        base: "" or a relative path. If all photos are in one folder, it is its parent: that folder may be their class.
        splits: file -> split, empty without split folders.
        places: file -> path after the base and the split folder, as parts.
    """
    parts = {file: tuple(file.split("/")) for file in tree.photos}
    folders = {file_parts[:-1] for file_parts in parts.values()}
    base = next(iter(folders))
    for other in folders:
        base = base[: next((i for i, (a, b) in enumerate(zip(base, other, strict=False)) if a != b), len(other))]
    is_class = len(folders) == 1 and base and base[-1].lower() not in SPLIT_FOLDERS
    if is_class and not is_camera_folder(base[-1]):
        base = base[:-1]
    if len(folders) > 1 and base and base[-1].lower() in SPLIT_FOLDERS:
        base = base[:-1]
    places = {file: file_parts[len(base) :] for file, file_parts in parts.items()}
    first = {place[0].lower() for place in places.values() if len(place) > 1}
    splits = {}
    if first and first <= set(SPLIT_FOLDERS) and all(len(place) > 1 for place in places.values()):
        splits = {file: SPLIT_FOLDERS[place[0].lower()] for file, place in places.items()}
        if "train" not in splits.values():
            splits = {}
        places = {file: place[1:] for file, place in places.items()}
    return "/".join(base), splits, places


def read_rows_of_photos(tree: Tree) -> FolderContents:
    """Return the photos with the labels, captions and splits of their metadata files.

    Raises:
        UserError: no photo has a row.
    """
    rows, found = read_metadata(tree.metadata), FolderContents("metadata", [], {}, dict(tree.others), tree.notices)
    names = ", ".join(sorted({Path(name).name for name in tree.metadata}))
    missing = [name for name in rows if name not in tree.photos]
    if len(missing) == len(rows):
        example = f" names {missing[0]}, which does not exist" if missing else " has no rows"
        raise UserError(
            f"{tree.folder}: {names}{example}: write each file_name relative to the folder of this file, or delete it"
        )
    if missing:
        found.notices.append(
            f"{len(missing)} photos of {names} are missing, for example {missing[0]}: they are left out"
        )
    has_labels = any(row.label is not None for row in rows.values())
    class_numbers, found.classes = label_numbers(
        sorted({row.label for row in rows.values() if row.label is not None}),
        read_classes(tree.folder / "classes.txt", found),
    )
    split_of = read_split(tree.folder / "split.json")
    _, folder_splits, _ = split_and_place(tree)
    without_row = [file for file in tree.photos if file not in rows]
    if without_row:
        effect = "they are left out" if has_labels else "they have no caption"
        found.notices.append(
            f"{len(without_row)} photos have no row in {names}, for example {without_row[0]}: {effect}"
        )
    for file, path in tree.photos.items():
        row = rows.get(file, Row())
        if has_labels and row.label is None:
            found.left_out[file] = f"no row in {names}" if file not in rows else f"no label in {names}"
            continue
        caption = row.captions[0] if row.captions else None
        split = split_of.get(file, "train") if split_of else folder_splits.get(file)
        found.photos.append(Photo(path, file, class_numbers.get(row.label), caption, split))
    most = max(len(row.captions) for row in rows.values())
    if most > 1:
        found.notices.append(f"photos have up to {most} captions in {names}: the first one is used")
    return found
