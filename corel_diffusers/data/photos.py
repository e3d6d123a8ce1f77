"""Load photos from any source as a DatasetDict.

Its columns are `image`, `label`, `caption` and `file_name`. Its splits are `train`, `validation` and `test`.
`find_photos` lists the photos of a folder in any supported layout. `load_photos` is the entry point of the training
scripts.
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
SHEET = "corel_dataset_samples.png"  # the contact sheet that `prepare` draws
SPLITS = ("train", "validation", "test")  # train on, choose the best model with, only report on
SPLIT_SEED = 0  # not the training seed: both scripts must hold out the same photos, whatever their training seeds are


@dataclass
class Photo:
    """One photo of a folder. `class_number` is None if the layout of the folder has no classes."""

    path: Path
    file_name: str
    class_number: int | None = None
    caption: str | None = None


@dataclass
class FolderContents:
    """The contents of a photo folder.

    `photos` is sorted by file name. `classes` maps class number -> name. `left_out` maps file name -> reason. `notices`
    are messages for the user.
    """

    layout: str
    photos: list[Photo]
    classes: dict[int, str]
    left_out: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def find_photos(folder: Path, layout: str = "auto") -> FolderContents:
    """List the photos of a folder without opening them.

    Args:
        layout: `corel` (0002_0017.png belongs to class 2; classes.txt has the class names), `corel-1k` (0.jpg to
            999.jpg, class = number // 100), `folders` (one folder per class), `flat` (no classes). `auto` chooses by
            the file names.

    Raises:
        UserError: the folder has no photo, or classes.txt or captions.json cannot be read.
    """
    files, folders = visible_files(folder), [d for d in visible_folders(folder) if not is_toolkit_output(d)]
    photo_files = [f for f in files if is_named_photo(f)]
    files_in = {d: visible_files(d) for d in folders}
    class_folders = {
        d: inside for d, all_files in files_in.items() if (inside := [f for f in all_files if is_named_photo(f)])
    }
    if layout == "auto":
        layout = layout_by_names([f.stem for f in photo_files], folder)
        if layout == "flat" and sum(map(len, class_folders.values())) > len(photo_files):
            layout = "folders"
    found = FolderContents(layout, [], {}, {printable(f.name): why_left_out(f) for f in files if not is_named_photo(f)})
    if not (class_folders if layout == "folders" else photo_files):
        raise UserError(f"No images found in {folder}: looked for {' '.join(PHOTO_ENDINGS)}; check --data-dir")
    captions = read_captions(folder / "captions.json")
    class_names = read_classes(folder / "classes.txt")

    if layout == "folders":
        if not_utf8 := [d for d in class_folders if not is_utf8(d.name)]:
            raise UserError(
                f"--data-dir {folder}: the name of the folder {printable(not_utf8[0].name)} is not UTF-8: rename it"
            )
        class_numbers, found.classes = folder_classes([d.name for d in class_folders], class_names)
        # A folder in which no name is UTF-8 is not a class folder. Report its files: no class may disappear silently.
        for directory, all_files in files_in.items():
            invalid = [
                f for f in all_files if not is_named_photo(f) and (directory in class_folders or not is_utf8(f.name))
            ]
            found.left_out |= {f"{printable(directory.name)}/{printable(f.name)}": why_left_out(f) for f in invalid}
        for directory, inside in class_folders.items():
            folder_captions = read_captions(directory / "captions.json")
            for file in inside:
                name = f"{directory.name}/{file.name}"
                caption = captions.get(name) or folder_captions.get(file.name)
                found.photos.append(Photo(file, name, class_numbers[directory.name], caption))
        if photo_files:
            found.notices.append(f"{len(photo_files)} photos outside the class folders are left out")
        nested = (inside for d in folders for inside in visible_folders(d))
        if example := next((d for d in nested if any(is_named_photo(f) for f in d.rglob("*"))), None):
            found.notices.append(
                f"photos in nested folders are left out, for example in {printable(str(example.relative_to(folder)))}/"
            )
        return found

    for file in photo_files:
        class_number = None
        if layout != "flat":
            match = re.fullmatch(r"(\d+)_\d+" if layout == "corel" else r"(\d{1,3})", file.stem)
            if not match:
                found.left_out[file.name] = f"its name does not match the {layout} layout"
                continue
            class_number = int(match[1]) // (1 if layout == "corel" else 100)
        found.photos.append(Photo(file, file.name, class_number, captions.get(file.name)))
    if layout == "corel-1k":
        found.notices.append(
            "file names are numbers from 0 to 999: read as Corel-1K, class = number // 100 "
            "(if the photos have no classes: corel-diffusers prepare --layout flat)"
        )
    present = sorted({p.class_number for p in found.photos if p.class_number is not None})
    found.classes = {n: class_names.get(n, str(n)) for n in present}
    if unnamed := [str(n) for n in present if n not in class_names]:
        found.notices.append(f"classes.txt has no name for class {', '.join(unnamed)}: the number is used as the name")
    if class_folders:
        found.notices.append(f"{len(class_folders)} folders with photos inside {folder.name} are left out")
    return found


def is_named_photo(file: Path) -> bool:
    """Return whether a file has a photo's ending and a UTF-8 name."""
    return file.suffix.lower() in PHOTO_ENDINGS and is_utf8(file.name)


def is_utf8(name: str) -> bool:
    """Return whether a file name is valid UTF-8. Linux allows other names; archives from other systems contain them."""
    return printable(name) == name


def printable(name: str) -> str:
    """Return a file name with each byte that is not UTF-8 replaced by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def visible_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder, sorted by name, without hidden files and FOLDER_FILES."""
    return sorted(
        f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".") and f.name not in FOLDER_FILES
    )


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted by name, without hidden folders."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def is_toolkit_output(folder: Path) -> bool:
    """Return whether this toolkit wrote the folder: a run, a contact sheet, or output of `prepare` or `generate`."""
    markers = ("run.json", "model_index.json", SHEET, "corel/source.json")
    return folder.name.endswith("_individual") or any((folder / marker).exists() for marker in markers)


def why_left_out(file: Path) -> str:
    return f"not an image ({file.suffix or 'no ending'})" if is_utf8(file.name) else "its name is not UTF-8: rename it"


def layout_by_names(stems: Sequence[str], folder: Path) -> str:
    """Return corel, corel-1k or flat, from the file names without their endings.

    Names that are the numbers 1 to n without a gap are a user's own flat photos: the numbers of Corel-1K start at 0.
    """
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
    """Return two mappings: class folder -> class number, and class number -> class name.

    If all folders have names such as `class_0003`, the class number is the number in the name, here 3. The class name
    comes from classes.txt, or is the name of the folder if classes.txt does not have the number.

    Otherwise the name of the folder is the class name. Its number comes from classes.txt if classes.txt lists
    all folders. Otherwise the sorted folders are numbered from 1.

    Args:
        named: class number -> class name, from classes.txt.
    """
    matches = {folder: re.fullmatch(r"class_(\d+)", folder) for folder in folders}
    if all(matches.values()):
        numbers = {folder: int(match[1]) for folder, match in matches.items()}
        return numbers, {number: named.get(number, folder) for folder, number in numbers.items()}
    number_of = {name: number for number, name in named.items()}
    all_listed = set(folders) <= set(number_of)
    numbers = {
        folder: number_of[folder] if all_listed else position for position, folder in enumerate(sorted(folders), 1)
    }
    return numbers, {number: folder for folder, number in sorted(numbers.items(), key=lambda item: item[1])}


def read_classes(file: Path) -> dict[int, str]:
    """Read classes.txt (one `<number> <name>` per line) as class number -> name; empty if there is no such file."""
    classes = {}
    for line_number, line in enumerate(
        file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file.is_file() else (), 1
    ):
        if line.strip():
            number, _, name = line.strip().partition(" ")
            if not number.isdigit() or not name.strip():
                raise UserError(f"{file} line {line_number}: {line.strip()!r} is not '<number> <name>'")
            classes[int(number)] = name.strip()
    if len(set(classes.values())) < len(classes):
        raise UserError(f"{file}: two classes have the same name: give each class its own name")
    return classes


def read_captions(file: Path) -> dict[str, str]:
    """Read captions.json, file name -> caption; empty if there is no such file."""
    captions = read_json(file) if file.is_file() else {}
    if not isinstance(captions, dict) or not all(isinstance(c, str) for c in captions.values()):
        raise UserError(f"{file}: expected one object {{file name: caption}}")
    return captions


def default_caption(class_name: str | None) -> str:
    return f"a photo of a {class_name}" if class_name else "a photo"


def split_photos(
    labels: Sequence, names: Sequence[str], groups: Sequence | None = None, test_fraction: float = 0.0
) -> list[str]:
    """Return "train", "validation" or "test" for each photo: a seeded split that is stratified by label.

    The photos of a class are ordered by a hash of their names. So when photos are added later, most other photos keep
    their split, and `test_fraction` does not change the validation photos. Photos of one group (duplicates) get the
    same split. Every class with at least two groups gets a validation photo.

    Args:
        groups: a group number per photo. By default each photo is its own group.
        test_fraction: the fraction of each class that becomes the test split.
    """
    groups = list(range(len(names))) if groups is None else groups
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    by_label = defaultdict(list)
    for indices in members.values():
        by_label[labels[min(indices, key=lambda i: names[i])]].append(indices)
    split_names = ["train"] * len(names)
    for label_groups in by_label.values():
        label_groups.sort(
            key=lambda indices: hashlib.sha256(f"{SPLIT_SEED} {min(names[i] for i in indices)}".encode()).digest()
        )
        num_photos = sum(map(len, label_groups))
        available = label_groups[:-1]  # the last group always trains
        # a group with more than `wanted` photos is held out only if no group is smaller
        smallest = min(map(len, available), default=0)
        for split, wanted in (
            ("validation", max(1, round(VALIDATION_FRACTION * num_photos))),
            ("test", round(test_fraction * num_photos)),
        ):
            taken, remaining = 0, []
            for indices in available:
                if taken < wanted and taken + len(indices) <= max(wanted, smallest):
                    for index in indices:
                        split_names[index] = split
                    taken += len(indices)
                else:
                    remaining.append(indices)
            available = remaining
    return split_names


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
        raise UserError(f"--data-dir {source} is not a folder: check the path (relative paths start at --base-dir)")
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


def dataset_of(
    images: list, labels: list[int], class_names: list[str], captions: list[str], file_names: list[str]
) -> Dataset:
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=class_names),
            "caption": Value("string"),
            "file_name": Value("string"),
        }
    )
    columns = {"image": images, "label": labels, "caption": captions, "file_name": file_names}
    return Dataset.from_dict(columns, features=features)


def with_split(photos: Dataset, split_names: Sequence[str] | None = None) -> DatasetDict:
    """Divide a Dataset into its splits. The split `test` exists only if it has a photo.

    Args:
        split_names: the split of each photo. By default `split_photos` chooses it.
    """
    split_names = split_names or split_photos(photos["label"][:], photos["file_name"][:])
    rows_of = {split: [i for i, name in enumerate(split_names) if name == split] for split in SPLITS}
    return DatasetDict({split: photos.select(rows) for split, rows in rows_of.items() if rows or split != "test"})


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
            f"use a dataset in which every photo has one"
        )
    held_out = [
        split
        for split in ("validation", "test")
        if split in loaded and split != train and has_labels(loaded[split], label)
    ]
    splits = (
        {"train": train}
        | ({"validation": held_out[0]} if held_out else {})
        | ({"test": held_out[1]} if held_out[1:] else {})
    )
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


def labelled(photos: Dataset, names: Sequence[str], class_names: list[str]) -> Dataset:
    """Return `photos` with a ClassLabel column `label`, from the class name of each photo (`names`)."""
    photos = photos.remove_columns("label") if "label" in photos.column_names else photos
    photos = photos.add_column("label", [class_names.index(name) for name in names])
    return photos.cast_column("label", ClassLabel(names=class_names))


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
