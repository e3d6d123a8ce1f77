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
    rows = read_metadata(tree.metadata) if layout == "auto" else {}
    if any(row.label is not None for row in rows.values()) or (rows and not tree.photos):
        return read_rows_of_photos(tree, rows)
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
    if layout != "folders":
        root, places = inside_of_only_folder(root, places, layout)
    class_of = read_layout(found, tree, root, places)
    tell_about_rows(found, tree, rows)
    captions = captions_of_photos(found, tree, root, places, rows)
    split_of = read_split(tree.folder / "split.json")
    for file in sorted(class_of):
        row = rows.get(file, Row())
        split = split_of.get(file, "train") if split_of else row.split or splits.get(file)
        found.photos.append(Photo(tree.photos[file], file, class_of[file], captions.get(file), split))
    return found


def read_layout(
    found: FolderContents, tree: Tree, root: Path, places: dict[str, tuple[str, ...]]
) -> dict[str, int | None]:
    """Find out the layout, if it is "auto", set the classes, and return file -> class number.

    Args:
        root: the folder that the places start from.
        places: see `split_and_place`.
    """
    is_given = found.layout != "auto"
    in_folders = [file for file, parts in places.items() if len(parts) > 1]
    loose = [file for file, parts in places.items() if len(parts) == 1]
    from_camera = in_folders and all(any(map(is_camera_folder, places[file][:-1])) for file in in_folders)
    if not is_given:
        found.layout = layout_by_names([Path(file).stem for file in loose], root)
        if found.layout == "flat" and len(in_folders) > len(loose) and not from_camera:
            found.layout = "folders"
    class_names = read_classes(root / "classes.txt", found)
    if found.layout == "folders":
        if loose:
            found.left_out |= dict.fromkeys(loose, "it lies outside the class folders")
            found.notices.append(f"{len(loose)} photos outside the class folders are left out")
        return classes_of_folders(found, tree, places, in_folders, class_names)
    if is_given or from_camera:
        return classes_of_names(found, list(places), class_names, root)
    if in_folders:
        folders = {places[file][0] for file in in_folders}
        found.left_out |= dict.fromkeys(in_folders, "it lies in a folder beside flat photos")
        found.notices.append(f"{len(folders)} folders with photos inside {root.name} are left out")
    return classes_of_names(found, loose, class_names, root)


def captions_of_photos(
    found: FolderContents, tree: Tree, root: Path, places: dict[str, tuple[str, ...]], rows: dict[str, Row]
) -> dict[str, str]:
    """Return file -> caption, from metadata files, captions.json or the words of Corel-5K.

    captions.json lies in the root or beside the photos. The file names in it are relative to its folder.
    """
    captions, found_captions = read_captions(root / "captions.json"), {}
    captions_in = lru_cache(maxsize=None)(lambda folder: read_captions(folder / "captions.json"))
    words = corel5k.read_words(root) if found.layout == "corel-5k" else {}
    for file, place in places.items():
        own = captions_in(tree.photos[file].parent).get(Path(file).name)
        row = rows.get(file, Row())
        given = (*row.captions[:1], captions.get("/".join(place)), captions.get(file), own)
        caption = next(filter(None, given), ", ".join(words.get(Path(file).stem, [])))
        if caption:
            found_captions[file] = caption
    return found_captions


def inside_of_only_folder(
    root: Path, places: dict[str, tuple[str, ...]], layout: str
) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """If all photos are in one folder and their names have a layout, return this folder and their places in it.

    Otherwise return the arguments unchanged.

    Corel-1K, for example, comes as image.orig/0.jpg. The lists of classes may lie in the folder or beside it.
    """
    folders, stems = {place[:-1] for place in places.values()}, [Path(file).stem for file in places]
    if len(folders) != 1 or folders == {()}:
        return root, places
    inner = root.joinpath(*next(iter(folders)))
    if layout == "auto" and layout_by_names(stems, root) == layout_by_names(stems, inner) == "flat":
        return root, places
    has_lists = any((root / name).is_file() for name in ("classes.txt", "training_label"))
    return root if has_lists else inner, {file: place[-1:] for file, place in places.items()}


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
    """Return the folder that contains all photos, the split of each photo, and the rest of its path.

    Returns:
        base: "" or a relative path. If all photos are in one folder, base is its parent, because the folder may be
            their class.
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
    named = {place[0]: SPLIT_FOLDERS.get(place[0].lower()) for place in places.values() if len(place) > 1}
    known, splits = {split for split in named.values() if split}, {}
    only_splits = known and None not in named.values() and all(len(place) > 1 for place in places.values())
    if only_splits or ("train" in known and len(known) > 1):
        inside = [file for file, place in places.items() if len(place) > 1 and named[place[0]]]
        beside = "it lies beside the folders of the splits"
        tree.others |= dict.fromkeys(places.keys() - set(inside), beside)
        if "train" in known:
            splits = {file: named[places[file][0]] for file in inside}
        return "/".join(base), splits, {file: places[file][1:] for file in inside}
    seconds = {place[1].lower() for place in places.values() if len(place) > 2}
    if "train" in {SPLIT_FOLDERS.get(name) for name in seconds} and seconds <= set(SPLIT_FOLDERS) and len(seconds) > 1:
        inside = [file for file, place in places.items() if len(place) > 2]
        tree.others |= dict.fromkeys(places.keys() - set(inside), "it lies beside the folders of the splits")
        splits = {file: SPLIT_FOLDERS[places[file][1].lower()] for file in inside}
        places = {file: (places[file][0], *places[file][2:]) for file in inside}
    return "/".join(base), splits, places


def read_rows_of_photos(tree: Tree, rows: dict[str, Row]) -> FolderContents:
    """Return the photos with the labels, captions and splits of their metadata files.

    Raises:
        UserError: no photo has a row, or a class has lost all its photos.
    """
    found = FolderContents("metadata", [], {}, dict(tree.others), tree.notices)
    tell_about_rows(found, tree, rows)
    names = names_of_metadata(tree)
    labels = {row.label for row in rows.values() if row.label is not None}
    kept = {row.label for file, row in rows.items() if file in tree.photos and row.label is not None}
    if lost := sorted(labels - kept):
        raise UserError(
            f"{tree.folder}: {names} lists the class {lost[0]}, but none of its photos exist: remove its rows"
        )
    class_numbers, found.classes = label_numbers(sorted(labels), read_classes(tree.folder / "classes.txt", found))
    split_of = read_split(tree.folder / "split.json")
    _, folder_splits, _ = split_and_place(tree)
    for file, path in tree.photos.items():
        row = rows.get(file, Row())
        if row.label is None:
            found.left_out[file] = f"no row in {names}" if file not in rows else f"no label in {names}"
            continue
        split = split_of.get(file, "train") if split_of else row.split or folder_splits.get(file)
        caption = next(iter(row.captions), None)
        found.photos.append(Photo(path, file, class_numbers[row.label], caption, split))
    return found


def names_of_metadata(tree: Tree) -> str:
    """Return the names of the metadata files for messages."""
    return ", ".join(sorted({Path(name).name for name in tree.metadata}))


def tell_about_rows(found: FolderContents, tree: Tree, rows: dict[str, Row]) -> None:
    """Add notices about rows without a photo, photos without a row, and several captions.

    Raises:
        UserError: no photo has a row.
    """
    if not tree.metadata:
        return
    names = names_of_metadata(tree)
    missing = [file for file in rows if file not in tree.photos]
    if rows and len(missing) == len(rows):
        why = tree.others.get(missing[0], "which does not exist")
        raise UserError(
            f"{tree.folder}: {names} names {missing[0]}, {why}: "
            f"write each file_name relative to the folder of {names}, or delete {names}"
        )
    if missing:
        why = tree.others.get(missing[0], "which does not exist")
        found.notices.append(f"{len(missing)} photos of {names} are missing, for example {missing[0]}, {why}")
    has_labels = any(row.label is not None for row in rows.values())
    if without := [file for file in tree.photos if file not in rows]:
        effect = "they are left out" if has_labels else "they have no caption"
        found.notices.append(f"{len(without)} photos have no row in {names}, for example {without[0]}: {effect}")
    if (most := max((len(row.captions) for row in rows.values()), default=0)) > 1:
        found.notices.append(f"photos have up to {most} captions in {names}: the first one is used")
