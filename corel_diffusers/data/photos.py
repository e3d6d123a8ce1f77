"""Load photos from any source as a DatasetDict.

Its columns are `image`, `label`, `caption` and `file_name`. Its splits are `train`, `validation` and `test`.
`load_photos` is the entry point of `evaluate`. The training scripts call `load_numbered_photos`, which also returns the
numbers of the classes. folders.py lists the photos of a folder, and datasets_library.py reads what the
library `datasets` has written.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from datasets import DatasetDict

from corel_diffusers.config.checks import DATA_DIR_HINT, SCENES
from corel_diffusers.data.columns import dataset_of, labelled
from corel_diffusers.data.datasets_library import TABLE_ENDINGS, is_saved_to_disk, load_dataset_folder, load_from_hub
from corel_diffusers.data.folder_contents import default_caption
from corel_diffusers.data.folders import photo_tree, read_tree
from corel_diffusers.data.splits import complete_split, with_split
from corel_diffusers.files import UserError


def load_photos(
    source: str | Path,
    *,
    classes: str | Iterable[str] = (),
    max_train_samples: int | None = None,
) -> DatasetDict:
    """Return the photos of `load_numbered_photos` without the class numbers."""
    return load_numbered_photos(source, classes=classes, max_train_samples=max_train_samples)[0]


def load_numbered_photos(
    source: str | Path,
    *,
    classes: str | Iterable[str] = (),
    max_train_samples: int | None = None,
) -> tuple[DatasetDict, dict[str, int]]:
    """Load photos from any source, and return them with the numbers of their classes.

    The splits are `train` and `validation`, and `test` if the source has test photos. The columns are `image` (Image; a
    path until it is decoded), `label` (ClassLabel; one class named "photo" if the source has no classes), `caption`
    (str) and `file_name` (str).

    Args:
        source: a folder (output of `corel-diffusers prepare`, raw Corel, class folders, flat, with metadata files, or
            written by `datasets`), a Hub dataset id (user/name, or user/name:config), or "scenes".
        classes: names or numbers of the classes to keep. By default all classes are kept.
        max_train_samples: keep at most this many training photos.

    Returns:
        The photos, and a dict class name -> number of the class in the source. `classes` and `generate --class` use
        this number.

    Raises:
        UserError: the photos cannot be loaded. The message says what to do.
    """
    if source == SCENES:
        from corel_diffusers.data.scenes import CLASS_NAMES, draw_scenes

        photos, numbers = with_split(draw_scenes()), dict(enumerate(CLASS_NAMES, 1))
    elif Path(source).is_dir():
        photos, numbers = load_folder(Path(source))
    elif isinstance(source, str):
        photos, numbers = load_from_hub(source)
    else:
        raise UserError(f"--data-dir {source} is not a folder: {DATA_DIR_HINT}")
    photos = keep_classes(photos, numbers, [classes] if isinstance(classes, str) else list(classes))
    if "test" in photos and not len(photos["test"]):  # the chosen classes have no test photo
        del photos["test"]
    if not len(photos["validation"]):  # the chosen classes have no validation photo
        photos = DatasetDict(photos | with_split(photos["train"]))
    if max_train_samples and max_train_samples < len(photos["train"]):
        order = sorted(
            range(len(photos["train"])), key=lambda i: hashlib.sha256(photos["train"]["file_name"][i].encode()).digest()
        )
        photos["train"] = photos["train"].select(sorted(order[:max_train_samples]))
    if not len(photos["train"]) or not len(photos["validation"]):
        raise UserError(f"{source}: at least two photos are needed, one of them for validation")
    kept = photos["train"].features["label"].names
    return photos, {name: number for number, name in numbers.items() if name in kept}


def load_folder(folder: Path) -> tuple[DatasetDict, dict[int, str]]:
    """Load a folder without changing its photos. Splits that it does not give are chosen by `split_photos`."""
    if is_saved_to_disk(folder):
        return load_dataset_folder(folder)
    tree = photo_tree(folder)
    if not tree.photos and any(name.endswith(TABLE_ENDINGS) for name in tree.others):
        return load_dataset_folder(folder)
    found = read_tree(tree)
    for notice in found.notices:
        print(notice)
    if found.left_out:
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(found.left_out.items())[:3])
        print(f"{len(found.left_out)} files are left out: {examples}{' …' if len(found.left_out) > 3 else ''}")
    class_names = list(found.classes.values()) or ["photo"]
    label_of = {number: label for label, number in enumerate(found.classes)}
    labels = [label_of.get(photo.class_number, 0) for photo in found.photos]
    names = [photo.file_name for photo in found.photos]
    photos = dataset_of(
        [str(photo.path) for photo in found.photos],
        labels,
        class_names,
        [photo.caption or default_caption(found.classes.get(photo.class_number)) for photo in found.photos],
        names,
    )
    split_names = complete_split(labels, names, [photo.split for photo in found.photos])
    return with_split(photos, split_names), found.classes


def keep_classes(photos: DatasetDict, numbers: dict[int, str], wanted: list[str]) -> DatasetDict:
    """Return the photos of the wanted classes, with labels from 0. An empty `wanted` keeps all photos.

    Args:
        numbers: class number -> class name.
        wanted: class names or class numbers.
    """
    if not wanted:
        return photos
    label = photos["train"].features["label"]
    chosen = {
        word: word if word in label.names else numbers.get(int(word)) if word.isdecimal() else None for word in wanted
    }
    for word, name in chosen.items():
        if name is None:
            known = ", ".join(f"{number} {name}" for number, name in numbers.items())
            raise UserError(f"--classes {word} is not in the data: its classes are {known or 'none'}")
    class_names = [name for name in label.names if name in chosen.values()]
    kept = {}
    for split, part in photos.items():
        part = part.select([i for i, name in enumerate(label.int2str(part["label"][:])) if name in class_names])
        kept[split] = labelled(part, label.int2str(part["label"][:]), class_names)
    return DatasetDict(kept)
