"""Any source of photos -> a DatasetDict with `image`, `label`, `caption`, `file_name`, split into train, validation and test.

`find_photos` reads a folder in each shape that photos are found in; `load_photos` is what the scripts call.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset

from corel_diffusers.arguments import SCENES
from corel_diffusers.files import UserError, first_line, read_json

PHOTO_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FOLDER_FILES = {"classes.txt", "captions.json", "metadata.jsonl", "split.json", "skipped.json"}
VALIDATION_FRACTION = 0.1
SHEET = "corel_dataset_samples.png"  # that `prepare` draws
SPLITS = ("train", "validation", "test")  # seen, chosen by, only reported on
SPLIT_SEED = 0  # not the training seed: both scripts must hold out the same photos whatever seed they train with


@dataclass
class Photo:
    """One photo of a folder. `number` is its class's number, None where the folder tells no classes."""

    path: Path
    file_name: str
    number: int | None = None
    caption: str | None = None


@dataclass
class Found:
    """What a folder holds: its photos in the order of their names, class number -> name, and what a user should know."""

    layout: str
    photos: list[Photo]
    classes: dict[int, str]
    not_photos: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def find_photos(folder: Path, layout: str = "auto") -> Found:
    """Reads a folder of photos; opens none of them.

    Layouts: `corel` (0002_0017.png is of class 2; names in classes.txt), `corel-1k` (0.jpg to 999.jpg, class = number // 100),
    `folders` (one folder a class), `flat` (no classes). `auto` tells them apart by the names.
    Raises UserError where there is no photo, and on a classes.txt or captions.json that cannot be read.
    """
    files, folders = visible_files(folder), [d for d in visible_folders(folder) if not is_ours(d)]
    pictures = [f for f in files if is_named_photo(f)]
    listed = {d: visible_files(d) for d in folders}
    subfolders = {d: inside for d, files_of in listed.items() if (inside := [f for f in files_of if is_named_photo(f)])}
    if layout == "auto":
        layout = layout_by_names([f.stem for f in pictures], folder)
        if layout == "flat" and sum(map(len, subfolders.values())) > len(pictures):
            layout = "folders"
    found = Found(layout, [], {}, {shown(f.name): not_a_picture(f) for f in files if not is_named_photo(f)})
    if not (subfolders if layout == "folders" else pictures):
        raise UserError(f"No images found in {folder}: looked for {' '.join(PHOTO_ENDINGS)}; check --data-dir")
    captions = read_captions(folder / "captions.json")
    names = read_classes(folder / "classes.txt")

    if layout == "folders":
        if unreadable := [d for d in subfolders if not is_utf8(d.name)]:
            raise UserError(f"--data-dir {folder}: the name of the folder {shown(unreadable[0].name)} is not UTF-8: rename it")
        numbers, found.classes = folder_classes([d.name for d in subfolders], names)
        for directory, files_of in listed.items():  # a class whose photos all have such names must not go in silence
            others = [f for f in files_of if not is_named_photo(f) and (directory in subfolders or not is_utf8(f.name))]
            found.not_photos |= {f"{shown(directory.name)}/{shown(f.name)}": not_a_picture(f) for f in others}
        for directory, inside in subfolders.items():
            inside_captions = read_captions(directory / "captions.json")
            for file in inside:
                name = f"{directory.name}/{file.name}"
                caption = captions.get(name) or inside_captions.get(file.name)
                found.photos.append(Photo(file, name, numbers[directory.name], caption))
        if pictures:
            found.notices.append(f"{len(pictures)} photos beside the class folders are left out")
        inner = (inside for d in folders for inside in visible_folders(d))
        if deeper := next((d for d in inner if any(is_named_photo(f) for f in d.rglob("*"))), None):
            found.notices.append(f"photos further down are left out, as in {shown(str(deeper.relative_to(folder)))}/")
        return found

    for file in pictures:
        number = None
        if layout != "flat":
            match = re.fullmatch(r"(\d+)_\d+" if layout == "corel" else r"(\d{1,3})", file.stem)
            if not match:
                found.not_photos[file.name] = f"its name is not of the {layout} form"
                continue
            number = int(match[1]) // (1 if layout == "corel" else 100)
        found.photos.append(Photo(file, file.name, number, captions.get(file.name)))
    if layout == "corel-1k":
        found.notices.append(
            "names are 0 to 999: read as Corel-1K, class = number // 100 (photos without classes: corel-diffusers prepare --layout flat)"
        )
    present = sorted({p.number for p in found.photos if p.number is not None})
    found.classes = {n: names.get(n, str(n)) for n in present}
    if unnamed := [str(n) for n in present if n not in names]:
        found.notices.append(f"no name in classes.txt for class {', '.join(unnamed)}: called by number")
    if subfolders:
        found.notices.append(f"{len(subfolders)} folders of photos inside {folder.name} are left out")
    return found


def is_named_photo(file: Path) -> bool:
    """Whether a file's name says that it is a photo."""
    return file.suffix.lower() in PHOTO_ENDINGS and is_utf8(file.name)


def is_utf8(name: str) -> bool:
    """Whether a name can be written down: Linux allows others, which archives from other systems have."""
    return shown(name) == name


def shown(name: str) -> str:
    """A name of a file for people, whatever bytes it consists of."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def visible_files(folder: Path) -> list[Path]:
    """The files directly in a folder, by name, but for hidden ones and those that describe the folder."""
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".") and f.name not in FOLDER_FILES)


def visible_folders(folder: Path) -> list[Path]:
    """The folders directly in a folder, by name, but for hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def is_ours(folder: Path) -> bool:
    """Whether the toolkit has written it: a run, a contact sheet, what `prepare` and `generate` leave."""
    marks = ("run.json", "model_index.json", SHEET, "corel/source.json")
    return folder.name.endswith("_individual") or any((folder / mark).exists() for mark in marks)


def not_a_picture(file: Path) -> str:
    return f"not a picture ({file.suffix or 'no ending'})" if is_utf8(file.name) else "its name is not UTF-8: rename it"


def layout_by_names(stems: Sequence[str], folder: Path) -> str:
    """corel, corel-1k or flat. Numbers from 1 to n without a gap are somebody's own photos; Corel-1K begins at 0."""
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
    """Class folder -> class number, and class number -> name. named: what classes.txt says.

    `class_0003` is of class 3 and called as classes.txt calls that. Other folders are called by themselves, and have the numbers of
    classes.txt where it has all of them, or else their places in the sorted list, from 1.
    """
    matches = {folder: re.fullmatch(r"class_(\d+)", folder) for folder in folders}
    if all(matches.values()):
        numbers = {folder: int(match[1]) for folder, match in matches.items()}
        return numbers, {number: named.get(number, folder) for folder, number in numbers.items()}
    known = {name: number for number, name in named.items()}
    listed = set(folders) <= set(known)
    numbers = {folder: known[folder] if listed else place for place, folder in enumerate(sorted(folders), 1)}
    return numbers, {number: folder for folder, number in sorted(numbers.items(), key=lambda item: item[1])}


def read_classes(file: Path) -> dict[int, str]:
    """classes.txt, `<number> <name>` a line, -> number -> name; empty where there is no such file."""
    classes = {}
    for place, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file.is_file() else (), 1):
        if line.strip():
            number, _, name = line.strip().partition(" ")
            if not number.isdigit() or not name.strip():
                raise UserError(f"{file} line {place}: {line.strip()!r} is not '<number> <name>'")
            classes[int(number)] = name.strip()
    if len(set(classes.values())) < len(classes):
        raise UserError(f"{file}: two classes have the same name; give each its own")
    return classes


def read_captions(file: Path) -> dict[str, str]:
    """captions.json, {file name: caption}, -> the same; empty where there is no such file."""
    captions = read_json(file) if file.is_file() else {}
    if not isinstance(captions, dict) or not all(isinstance(c, str) for c in captions.values()):
        raise UserError(f"{file}: expected one object {{file name: caption}}")
    return captions


def default_caption(class_name: str | None) -> str:
    return f"a photo of a {class_name}" if class_name else "a photo"


def split_photos(labels: Sequence, names: Sequence[str], groups: Sequence | None = None, test_fraction: float = 0.0) -> list[str]:
    """ "train", "validation" or "test" for each photo: stratified by label, seeded, photo by photo.

    A photo's place in its class is the hash of its name, so photos added later leave most others on their side, and a test
    fraction leaves the validation photos what they were. Photos of one group (duplicates) go to one side. Every class with
    two groups or more gets a validation photo.
    """
    groups = list(range(len(names))) if groups is None else groups
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    by_label = defaultdict(list)
    for indices in members.values():
        by_label[labels[min(indices, key=lambda i: names[i])]].append(indices)
    sides = ["train"] * len(names)
    for label_groups in by_label.values():
        label_groups.sort(key=lambda indices: hashlib.sha256(f"{SPLIT_SEED} {min(names[i] for i in indices)}".encode()).digest())
        photos = sum(map(len, label_groups))
        free = label_groups[:-1]  # the last one always trains
        smallest = min(map(len, free), default=0)  # a long series is not held out, unless there is nothing else
        for side, wanted in (("validation", max(1, round(VALIDATION_FRACTION * photos))), ("test", round(test_fraction * photos))):
            taken, left = 0, []
            for indices in free:
                if taken < wanted and taken + len(indices) <= max(wanted, smallest):
                    for index in indices:
                        sides[index] = side
                    taken += len(indices)
                else:
                    left.append(indices)
            free = left
    return sides


def load_photos(
    source: str | Path,
    *,
    classes: Iterable[str] = (),
    max_train_samples: int | None = None,
) -> DatasetDict:
    """`load_numbered_photos` without the numbers."""
    return load_numbered_photos(source, classes=classes, max_train_samples=max_train_samples)[0]


def load_numbered_photos(
    source: str | Path,
    *,
    classes: Iterable[str] = (),
    max_train_samples: int | None = None,
) -> tuple[DatasetDict, dict[str, int]]:
    """Photos of any source, with the splits `train` and `validation`, and `test` where photos were set aside to report on.

    source: a folder (prepared by `corel-diffusers prepare`, raw Corel, class folders, flat), a Hub dataset id, or "scenes".
    classes: names or numbers of the classes to keep.
    Columns: `image` (Image; a path until it is decoded), `label` (ClassLabel; one class named "photo" where the source tells
    none), `caption` (str), `file_name` (str). Also returns class name -> the number that the class has in the source, which `classes`
    and `generate --class` go by. Raises UserError with the way out.
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
        raise UserError(f"--data-dir {source} is no folder: check the path (relative ones start at --base-dir)")
    photos = keep_classes(photos, numbers, list(classes))
    if "test" in photos and not len(photos["test"]):  # the classes that were picked have none set aside
        del photos["test"]
    if not len(photos["validation"]):  # the classes that were picked have none held out
        photos = DatasetDict(photos | with_split(photos["train"]))
    if max_train_samples and max_train_samples < len(photos["train"]):
        order = sorted(range(len(photos["train"])), key=lambda i: hashlib.sha256(photos["train"]["file_name"][i].encode()).digest())
        photos["train"] = photos["train"].select(sorted(order[:max_train_samples]))
    if not len(photos["train"]) or not len(photos["validation"]):
        raise UserError(f"{source}: two photos or more are needed, one of them to validate on")
    kept = photos["train"].features["label"].names
    return photos, {name: number for number, name in numbers.items() if name in kept}


def dataset_of(images: list, labels: list[int], class_names: list[str], captions: list[str], file_names: list[str]) -> Dataset:
    features = Features(
        {"image": Image(), "label": ClassLabel(names=class_names), "caption": Value("string"), "file_name": Value("string")}
    )
    columns = {"image": images, "label": labels, "caption": captions, "file_name": file_names}
    return Dataset.from_dict(columns, features=features)


def with_split(photos: Dataset, sides: Sequence[str] | None = None) -> DatasetDict:
    """One Dataset -> its splits, by `sides` or else by `split_photos`; there is no `test` where no photo is in it."""
    sides = sides or split_photos(photos["label"][:], photos["file_name"][:])
    parts = {split: [i for i, side in enumerate(sides) if side == split] for split in SPLITS}
    return DatasetDict({split: photos.select(rows) for split, rows in parts.items() if rows or split != "test"})


def load_folder(folder: Path) -> tuple[DatasetDict, dict[int, str]]:
    """A raw folder as it is: photos untouched, split by name."""
    found = find_photos(folder)
    for notice in found.notices:
        print(notice)
    if found.not_photos:
        named = "; ".join(f"{name}: {reason}" for name, reason in list(found.not_photos.items())[:3])
        print(f"{len(found.not_photos)} files are left out: {named}{' …' if len(found.not_photos) > 3 else ''}")
    names = list(found.classes.values()) or ["photo"]
    index = {number: place for place, number in enumerate(found.classes)}
    captions = [p.caption or default_caption(found.classes.get(p.number)) for p in found.photos]
    photos = dataset_of(
        [str(p.path) for p in found.photos],
        [index.get(p.number, 0) for p in found.photos],
        names,
        captions,
        [p.file_name for p in found.photos],
    )
    return with_split(photos), found.classes


def load_prepared(folder: Path) -> tuple[DatasetDict, dict[int, str]]:
    """An imagefolder with metadata.jsonl; its split.json and classes.txt are used where they exist."""
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8-sig").split("\n")  # splitlines knows more ends of lines than JSON
        rows = [json.loads(line) for line in lines if line.strip()]
        file_names = [row["file_name"] for row in rows]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{folder / 'metadata.jsonl'}: each line must be a JSON object with file_name, in UTF-8") from None
    if missing := [name for name in file_names if not (folder / name).is_file()]:
        raise UserError(f"{folder / 'metadata.jsonl'} names {missing[0]}, which is not there: run prepare again")
    named = read_classes(folder / "classes.txt")
    labels = [str(row.get("label", "photo")) for row in rows]
    numbers = named if set(labels) <= set(named.values()) else dict(enumerate(sorted(set(labels)), 1))
    numbers = {number: name for number, name in numbers.items() if name in labels}
    names = list(numbers.values())
    captions = [row.get("caption") or row.get("text") or default_caption(row.get("label")) for row in rows]
    paths = [str(folder / name) for name in file_names]
    photos = dataset_of(paths, [names.index(label) for label in labels], names, captions, file_names)
    sides = None
    if (folder / "split.json").is_file():
        split = read_json(folder / "split.json")
        if not isinstance(split, dict) or not isinstance(split.get("validation"), list):
            raise UserError(f'{folder / "split.json"}: expected {{"train": [...], "validation": [...]}}; remove it to split anew')
        side_of = {name: side for side in ("validation", "test") for name in split.get(side, ())}
        sides = [side_of.get(name, "train") for name in file_names]
    return with_split(photos, sides), numbers


def load_from_hub(repo_id: str) -> tuple[DatasetDict, dict[int, str]]:
    """A Hub dataset: its first Image column, its ClassLabel (or string) column, its captions, its splits."""
    try:
        loaded = load_dataset(repo_id)
    except Exception as error:  # the Hub's client has many: offline, not found, gated, no such format
        raise UserError(f"--dataset-name {repo_id} cannot be loaded: {first_line(error)}") from None
    features = next(iter(loaded.values())).features
    image = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
    if image is None:
        raise UserError(f"--dataset-name {repo_id} has no column of images: it has {', '.join(features)}")
    label = next((n for n, f in features.items() if isinstance(f, ClassLabel)), "label" if "label" in features else None)
    caption = next((name for name in ("caption", "text") if name in features), None)

    def names_of(part: Dataset) -> list[str]:
        if label is None:
            return ["photo"] * len(part)
        values = part[label][:]
        return features[label].int2str(values) if isinstance(features[label], ClassLabel) else [str(v) for v in values]

    train = "train" if "train" in loaded else next(iter(loaded))
    if not has_labels(loaded[train], label):
        raise UserError(f"--dataset-name {repo_id}: some photos of its {train} split have no {label}: give a dataset that has them all")
    held_out = [split for split in ("validation", "test") if split in loaded and split != train and has_labels(loaded[split], label)]
    splits = {"train": train} | ({"validation": held_out[0]} if held_out else {}) | ({"test": held_out[1]} if held_out[1:] else {})
    ordered = getattr(features.get(label), "names", None) or sorted({n for split in splits.values() for n in names_of(loaded[split])})

    def uniform(split: str) -> Dataset:
        part = loaded[split]
        names = names_of(part)
        captions = part[caption][:] if caption else [default_caption(name if label else None) for name in names]
        file_names = part["file_name"][:] if "file_name" in features else [f"{split}/{i:07d}" for i in range(len(part))]
        part = part.select_columns([image])
        part = (part if image == "image" else part.rename_column(image, "image")).add_column("caption", captions)
        return labelled(part.add_column("file_name", file_names), names, ordered)

    photos = DatasetDict({split: uniform(name) for split, name in splits.items()})
    return photos if held_out else with_split(photos["train"]), dict(enumerate(ordered, 1))


def has_labels(part: Dataset, label: str | None) -> bool:
    """Whether each photo of a split is labelled: published test splits often are not, or hold -1."""
    return label is None or (label in part.features and not any(value in (None, -1) for value in part[label][:]))


def labelled(photos: Dataset, names: Sequence[str], class_names: list[str]) -> Dataset:
    """`photos` with a `label` column: the place of each photo's class name in `class_names`."""
    photos = photos.remove_columns("label") if "label" in photos.column_names else photos
    photos = photos.add_column("label", [class_names.index(name) for name in names])
    return photos.cast_column("label", ClassLabel(names=class_names))


def keep_classes(photos: DatasetDict, numbers: dict[int, str], wanted: list[str]) -> DatasetDict:
    """The photos of the wanted classes, given by name or number, relabelled from 0; all of them when none is named."""
    if not wanted:
        return photos
    label = photos["train"].features["label"]
    chosen = {word: word if word in label.names else numbers.get(int(word)) if word.isdigit() else None for word in wanted}
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
