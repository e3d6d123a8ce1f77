"""Load photos from any source as a DatasetDict.

Its columns are `image`, `label`, `caption` and `file_name`. Its splits are `train`, `validation` and `test`.
`load_photos` is the entry point of train_vae.py and of `evaluate`. train_unet.py calls `load_numbered_photos`, which
also returns the numbers of the classes. folders.py lists the photos of a folder.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset

from corel_diffusers.config.checks import DATA_DIR_HINT, SCENES
from corel_diffusers.data.columns import dataset_of, labelled
from corel_diffusers.data.folders import default_caption, find_photos, read_classes
from corel_diffusers.data.splits import with_split
from corel_diffusers.files import UserError, first_line, read_json


def load_photos(
    source: str | Path,
    *,
    classes: Iterable[str] = (),
    max_train_samples: int | None = None,
) -> DatasetDict:
    """Return the photos of `load_numbered_photos` without the class numbers."""
    return load_numbered_photos(source, classes=classes, max_train_samples=max_train_samples)[0]


def load_numbered_photos(
    source: str | Path,
    *,
    classes: Iterable[str] = (),
    max_train_samples: int | None = None,
) -> tuple[DatasetDict, dict[str, int]]:
    """Load photos from any source, and return them with the numbers of their classes.

    The splits are `train` and `validation`, and `test` if the source has test photos. The columns are `image` (Image; a
    path until it is decoded), `label` (ClassLabel; one class named "photo" if the source has no classes), `caption`
    (str) and `file_name` (str).

    Args:
        source: a folder (output of `corel-diffusers prepare`, raw Corel, class folders, flat), a Hub dataset id, or
            "scenes".
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
        folder = Path(source)
        photos, numbers = load_prepared(folder) if (folder / "metadata.jsonl").is_file() else load_folder(folder)
    elif isinstance(source, str):
        photos, numbers = load_from_hub(source)
    else:
        raise UserError(f"--data-dir {source} is not a folder: {DATA_DIR_HINT}")
    photos = keep_classes(photos, numbers, list(classes))
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
    """Load a raw folder without changing its photos, split by `split_photos`."""
    found = find_photos(folder)
    for notice in found.notices:
        print(notice)
    if found.left_out:
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(found.left_out.items())[:3])
        print(f"{len(found.left_out)} files are left out: {examples}{' …' if len(found.left_out) > 3 else ''}")
    class_names = list(found.classes.values()) or ["photo"]
    label_of = {number: label for label, number in enumerate(found.classes)}
    captions = [p.caption or default_caption(found.classes.get(p.class_number)) for p in found.photos]
    photos = dataset_of(
        [str(p.path) for p in found.photos],
        [label_of.get(p.class_number, 0) for p in found.photos],
        class_names,
        captions,
        [p.file_name for p in found.photos],
    )
    return with_split(photos), found.classes


def load_prepared(folder: Path) -> tuple[DatasetDict, dict[int, str]]:
    """Load an imagefolder with metadata.jsonl. Its split.json and classes.txt are used if they exist."""
    try:
        # not splitlines(): it also splits at characters that JSON allows inside a line
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8-sig").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        file_names = [row["file_name"] for row in rows]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'metadata.jsonl'}: each line must be a JSON object with file_name, in UTF-8"
        ) from None
    if missing := [name for name in file_names if not (folder / name).is_file()]:
        raise UserError(f"{folder / 'metadata.jsonl'} names {missing[0]}, which does not exist: run prepare again")
    named = read_classes(folder / "classes.txt")
    row_classes = [str(row.get("label", "photo")) for row in rows]
    numbers = named if set(row_classes) <= set(named.values()) else dict(enumerate(sorted(set(row_classes)), 1))
    numbers = {number: name for number, name in numbers.items() if name in row_classes}
    class_names = list(numbers.values())
    captions = [row.get("caption") or row.get("text") or default_caption(row.get("label")) for row in rows]
    paths = [str(folder / name) for name in file_names]
    photos = dataset_of(paths, [class_names.index(name) for name in row_classes], class_names, captions, file_names)
    split_names = None
    if (folder / "split.json").is_file():
        splits = read_json(folder / "split.json")
        if not isinstance(splits, dict) or not isinstance(splits.get("validation"), list):
            raise UserError(
                f'{folder / "split.json"}: expected {{"train": [...], "validation": [...]}}; delete it for a new split'
            )
        split_of = {name: split for split in ("validation", "test") for name in splits.get(split, ())}
        split_names = [split_of.get(name, "train") for name in file_names]
    return with_split(photos, split_names), numbers


def load_from_hub(repo_id: str) -> tuple[DatasetDict, dict[int, str]]:
    """Load a Hub dataset: its first Image column, its ClassLabel column or its column `label`, its captions and splits.

    If it has no `validation` or `test` split with a label for every photo, `split_photos` splits the training photos.
    """
    try:
        loaded = load_dataset(repo_id)
    except Exception as error:  # the Hub client raises many types: offline, not found, gated, unknown format
        raise UserError(f"--dataset-name {repo_id} cannot be loaded: {first_line(error)}") from None
    features = next(iter(loaded.values())).features
    image = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
    if image is None:
        raise UserError(f"--dataset-name {repo_id} has no image column: its columns are {', '.join(features)}")
    label = next(
        (n for n, f in features.items() if isinstance(f, ClassLabel)), "label" if "label" in features else None
    )
    caption = next((name for name in ("caption", "text") if name in features), None)

    def class_names_of(part: Dataset) -> list[str]:
        if label is None:
            return ["photo"] * len(part)
        values = part[label][:]
        return features[label].int2str(values) if isinstance(features[label], ClassLabel) else [str(v) for v in values]

    train = "train" if "train" in loaded else next(iter(loaded))
    if not has_labels(loaded[train], label):
        raise UserError(
            f"--dataset-name {repo_id}: some photos of its {train} split have no {label}: "
            "use a dataset in which every photo has one"
        )
    held_out = [
        split
        for split in ("validation", "test")
        if split in loaded and split != train and has_labels(loaded[split], label)
    ]
    splits = {"train": train} | dict(zip(("validation", "test"), held_out, strict=False))
    class_names = getattr(features.get(label), "names", None) or sorted(
        {n for split in splits.values() for n in class_names_of(loaded[split])}
    )

    def with_our_columns(split: str) -> Dataset:
        part = loaded[split]
        names = class_names_of(part)
        captions = part[caption][:] if caption else [default_caption(name if label else None) for name in names]
        file_names = part["file_name"][:] if "file_name" in features else [f"{split}/{i:07d}" for i in range(len(part))]
        part = part.select_columns([image])
        part = (part if image == "image" else part.rename_column(image, "image")).add_column("caption", captions)
        return labelled(part.add_column("file_name", file_names), names, class_names)

    photos = DatasetDict({split: with_our_columns(name) for split, name in splits.items()})
    return photos if held_out else with_split(photos["train"]), dict(enumerate(class_names, 1))


def has_labels(part: Dataset, label: str | None) -> bool:
    """Return whether every photo of a split has a label. Test splits on the Hub often have no labels, or only -1."""
    return label is None or (label in part.features and not any(value in (None, -1) for value in part[label][:]))


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
        word: word if word in label.names else numbers.get(int(word)) if word.isdigit() else None for word in wanted
    }
    for word, name in chosen.items():
        if name is None:
            known = ", ".join(f"{number} {name}" for number, name in numbers.items())
            raise UserError(f"--classes {word} is not in the data: its classes are {known}")
    class_names = [name for name in label.names if name in chosen.values()]
    kept = {}
    for split, part in photos.items():
        part = part.select([i for i, name in enumerate(label.int2str(part["label"][:])) if name in class_names])
        kept[split] = labelled(part, label.int2str(part["label"][:]), class_names)
    return DatasetDict(kept)
