"""Read a folder of photos: its layout, its classes, its splits and its captions. No photo is opened."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from corel_diffusers.data import corel5k
from corel_diffusers.data.folder_contents import FolderContents, Photo, split_named
from corel_diffusers.data.folder_files import read_captions, read_classes, read_split
from corel_diffusers.data.layouts import (
    classes_of_folders,
    classes_of_names,
    layout_by_names,
    number_classes,
    require_class_names,
)
from corel_diffusers.data.metadata import Row, read_metadata
from corel_diffusers.data.tree import Tree, is_prepared, list_tree, most_common_reasons
from corel_diffusers.files import UserError

# Cameras begin a new folder, such as 100CANON, after some photos: it is not a class.
CAMERA_FOLDER = r"DCIM|\d{3}(?=.*[A-Z_])[A-Z0-9_]{5}"
Places = dict[str, tuple[str, ...]]  # file -> the parts of its path after the base and the split folder


def find_photos(folder: Path, layout: str = "auto") -> FolderContents:
    """List the photos of a folder, and of the folders inside it, without opening them: see `read_tree`."""
    return read_tree(photo_tree(folder), layout)


def photo_tree(folder: Path) -> Tree:
    """List a folder. For training_data/ or training_data/corel/ of `prepare`, list the corel_all/ in it."""
    for corel in (folder, folder / "corel"):
        if is_prepared(corel):
            tree = list_tree(corel / "corel_all")
            tree.notices.append(f"{folder} was written by `prepare`: the photos are read from {tree.folder}")
            return tree
    return list_tree(folder)


def read_tree(tree: Tree, layout: str = "auto") -> FolderContents:
    """Return the photos of a listed folder with their classes, captions and splits.

    Args:
        layout: `corel` (0002_0017.png belongs to class 2; classes.txt has the class names), `corel-1k` (0.jpg to
            999.jpg, class = number // 100), `corel-5k` (1000.jpeg to 384096.jpeg, class = number // 1000), `folders`
            (one folder per class), `names` (cat_01.jpg belongs to class cat), `flat` (no classes). `auto` chooses by
            the names, and reads metadata files if there are any. Each layout can lie in the folders train, val and
            test.

    Raises:
        UserError: there is no photo, a class has lost all its photos, the name of a class has a control character, or
            a file beside the photos cannot be read.
    """
    rows = read_metadata(tree.metadata) if layout == "auto" else {}
    has_labels = any(row.label is not None for row in rows.values())
    if not tree.photos and not rows:
        reasons = tree.others | tree.closed
        seen = f"; it has {most_common_reasons(reasons)}" if reasons else ""
        raise UserError(
            f"No images found in {tree.folder}: looked for .png .jpg .jpeg .webp .tif .gif and other endings that "
            f"Pillow opens{seen}; check --data-dir"
        )
    found = FolderContents(layout, [], {}, tree.others | tree.closed, tree.notices)
    if tree.metadata and layout == "auto" and not rows:
        found.notices.append(f"{names_of_metadata(tree)} has no rows: it is ignored")
    if rows:
        tell_about_rows(found, tree, rows, has_labels)
    base, splits, places = split_and_place([*tree.photos, *tree.closed])
    words: dict[str, list[str]] = {}
    if has_labels:
        found.layout, class_of = "metadata", classes_of_rows(found, tree, rows)
    else:
        beside = tree.photos.keys() - places.keys()
        found.left_out |= dict.fromkeys(beside, "it lies beside the folders of the splits")
        if base:
            found.notices.append(f"the photos are read from {base}")
        root, places = inside_of_only_folder(tree.folder / base, places, layout)
        words = corel5k.read_words(root)
        class_of = read_layout(found, root, places, tree.closed, words)
    require_class_names(found.classes, tree.folder)
    captions, split_file = captions_of_files(tree), read_split(tree.folder / "split.json")
    for file in sorted(class_of):
        row = rows.get(file, Row())
        given = (*row.captions[:1], captions.get(file), ", ".join(words.get(Path(file).stem, [])))
        split = split_file.get(file, "train") if split_file else row.split or splits.get(file)
        caption = next(filter(None, given), None)
        found.photos.append(Photo(tree.photos[file], file, class_of[file], caption, split))
    return found


def split_and_place(files: Iterable[str]) -> tuple[str, dict[str, str], Places]:
    """Return the folder that contains all photos, the split of each photo, and the rest of its path.

    Returns:
        base: "" or a relative path. If all photos are in one folder, base is its parent, because the folder may be
            their class.
        splits: file -> split, empty without split folders.
        places: the rest of the path of each file. With split folders, files beside them have no place.
    """
    parts = {file: tuple(file.split("/")) for file in files}
    folders = {place[:-1] for place in parts.values()}
    base = common_start(folders)
    if base:
        is_split, is_only = bool(split_named(base[-1])), len(folders) == 1
        if is_split != is_only and not (is_only and is_camera_folder(base[-1])):
            base = base[:-1]
    places = {file: place[len(base) :] for file, place in parts.items()}
    for level in (0, 1):  # train/cat/a.jpg, or cat/train/a.jpg
        split_at = {file: split_named(place[level]) for file, place in places.items() if len(place) > level + 1}
        inside = {file: split for file, split in split_at.items() if split}
        known = set(inside.values())
        # the split folders are the only folders, or training photos and others are among them
        are_only = bool(known) and len(inside) == (len(places) if level == 0 else len(split_at))
        has_train = "train" in known and len(known) > 1
        if (level == 0 and (are_only or has_train)) or (are_only and has_train):
            rest = {file: places[file][:level] + places[file][level + 1 :] for file in inside}
            return "/".join(base), inside if "train" in known else {}, rest
    return "/".join(base), {}, places


def common_start(folders: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the parts that all paths begin with. In sorted order, the first and the last path differ most."""
    first, last = min(folders), max(folders)
    length = next((i for i, parts in enumerate(zip(first, last, strict=False)) if len(set(parts)) > 1), len(first))
    return first[:length]


def is_camera_folder(name: str) -> bool:
    """Return whether a camera made the folder. It is not a class."""
    return bool(re.fullmatch(CAMERA_FOLDER, name))


def inside_of_only_folder(root: Path, places: Places, layout: str) -> tuple[Path, Places]:
    """If all photos are in one folder and their names have a layout, return this folder and their places in it.

    Corel-1K, for example, comes as image.orig/0.jpg. The lists of classes may lie in the folder or beside it. Otherwise
    return the arguments unchanged.
    """
    folders, stems = {place[:-1] for place in places.values()}, [Path(file).stem for file in places]
    if layout == "folders" or len(folders) != 1 or folders == {()}:
        return root, places
    inner = root.joinpath(*next(iter(folders)))
    if layout == "auto" and layout_by_names(stems, root) == layout_by_names(stems, inner) == "flat":
        return root, places
    has_lists = any((root / name).is_file() for name in ("classes.txt", "training_label"))
    return root if has_lists else inner, {file: place[-1:] for file, place in places.items()}


def read_layout(
    found: FolderContents, root: Path, places: Places, closed: dict[str, str], words: dict[str, list[str]]
) -> dict[str, int | None]:
    """Find out the layout, if it is "auto", set the classes, and return file -> class number.

    Args:
        root: the folder that the places start from.
        places: of the photos and of the closed photos, see `split_and_place`.
        closed: photos that this Pillow cannot open -> what to do.
        words: the words of the photos of Corel-5K.
    """
    is_given = found.layout != "auto"
    photos = [file for file in places if file not in closed]
    in_folders = [file for file in photos if len(places[file]) > 1]
    loose = [file for file in photos if len(places[file]) == 1]
    from_camera = in_folders and all(any(map(is_camera_folder, places[file][:-1])) for file in in_folders)
    if not is_given:
        found.layout = layout_by_names([Path(file).stem for file in loose], root)
        if found.layout == "flat" and len(in_folders) > len(loose) and not from_camera:
            found.layout = "folders"
    named = read_classes(root / "classes.txt", found)
    if found.layout == "folders":
        if loose:
            found.left_out |= dict.fromkeys(loose, "it lies outside the class folders")
            found.notices.append(f"{len(loose)} photos outside the class folders are left out")
        if nested := [file for file in in_folders if len(places[file]) > 2]:
            found.notices.append(
                f"{len(nested)} photos lie deeper than their class folder, for example {nested[0]}: "
                "they get the class of that class folder"
            )
        folder_of = {file: place[0] for file, place in places.items() if len(place) > 1}
        return classes_of_folders(found, folder_of, closed, named)
    if is_given or from_camera:
        return classes_of_names(found, photos, named, words)
    if in_folders:
        found.left_out |= dict.fromkeys(in_folders, "it lies in a folder beside flat photos")
        found.notices.append(f"{len(in_folders)} photos in folders beside flat photos are left out")
    return classes_of_names(found, loose, named, words)


def captions_of_files(tree: Tree) -> dict[str, str]:
    """Return file -> caption of all captions.json. The names in a captions.json are relative to its folder."""
    return {
        os.path.normpath(os.path.join(os.path.dirname(relative), name)).replace(os.sep, "/"): caption
        for relative, path in tree.captions.items()
        for name, caption in read_captions(path).items()
    }


def classes_of_rows(found: FolderContents, tree: Tree, rows: dict[str, Row]) -> dict[str, int]:
    """Return file -> class number for the photos with a label in metadata files, and set the classes.

    Raises:
        UserError: a class has lost all its photos.
    """
    names = names_of_metadata(tree)
    labels = {file: row.label for file, row in rows.items() if row.label is not None}
    kept = {file: label for file, label in labels.items() if file in tree.photos}
    if lost := sorted(set(labels.values()) - set(kept.values())):
        hint = "but none of its photos can be used: remove its rows"
        raise UserError(f"{tree.folder}: {names} lists the class {lost[0]}, {hint}")
    numbers, found.classes = number_classes(set(kept.values()), read_classes(tree.folder / "classes.txt", found))
    found.left_out |= {
        file: f"no label in {names}" if file in rows else f"no row in {names}"
        for file in tree.photos.keys() - kept.keys()
    }
    return {file: numbers[label] for file, label in kept.items()}


def names_of_metadata(tree: Tree) -> str:
    """Return the names of the metadata files for messages."""
    return ", ".join(sorted({Path(name).name for name in tree.metadata}))


def tell_about_rows(found: FolderContents, tree: Tree, rows: dict[str, Row], has_labels: bool) -> None:
    """Add notices about rows without a photo, photos without a row, and several captions.

    Raises:
        UserError: no photo has a row.
    """
    names, why = names_of_metadata(tree), tree.others | tree.closed
    missing = [file for file in rows if file not in tree.photos]
    if missing:
        example = f"{missing[0]}, {why.get(missing[0], 'which does not exist')}"
        if len(missing) == len(rows):
            hint = f"write each file_name relative to the folder of {names}, or delete {names}"
            raise UserError(f"{tree.folder}: {names} names {example}: {hint}")
        found.notices.append(f"{len(missing)} photos of {names} are missing, for example {example}")
    if without := [file for file in tree.photos if file not in rows]:
        effect = "they are left out" if has_labels else "they have no caption"
        found.notices.append(f"{len(without)} photos have no row in {names}, for example {without[0]}: {effect}")
    if (most := max(len(row.captions) for row in rows.values())) > 1:
        found.notices.append(f"photos have up to {most} captions in {names}: the first one is used")
