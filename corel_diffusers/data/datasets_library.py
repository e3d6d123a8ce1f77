"""Load what the library `datasets` reads: datasets of the Hub, folders of `save_to_disk`, and files of tables."""

from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    Value,
    get_dataset_config_names,
    load_dataset,
    load_from_disk,
)

from corel_diffusers.data.columns import labelled
from corel_diffusers.data.folder_contents import SPLIT_FOLDERS, default_caption, split_named
from corel_diffusers.data.layouts import number_classes, require_class_names
from corel_diffusers.data.metadata import CAPTION_KEYS, LABEL_KEYS
from corel_diffusers.data.splits import with_split
from corel_diffusers.files import UserError, first_line

TABLE_ENDINGS = (".parquet", ".arrow", ".tar")


def is_saved_to_disk(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder."""
    is_dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_dataset or (folder / "dataset_dict.json").is_file()


def load_dataset_folder(folder: Path) -> tuple[DatasetDict, dict[int, str]]:
    """Load a folder of `save_to_disk` or of tables, see `with_our_columns`.

    Raises:
        UserError: `datasets` cannot load it.
    """
    try:
        if is_saved_to_disk(folder):
            loaded = load_from_disk(str(folder))
            loaded = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
        else:
            loaded = load_dataset(str(folder))
    except Exception as error:  # `datasets` raises many types
        raise UserError(
            f"{folder} cannot be loaded with `datasets` ({first_line(error)}): give a folder of photos instead"
        ) from None
    return with_our_columns(loaded, str(folder))


def load_from_hub(name: str) -> tuple[DatasetDict, dict[int, str]]:
    """Load a dataset from the Hub, see `with_our_columns`.

    Args:
        name: the Hub id, or user/name:config for one configuration of the dataset.
    """
    repo_id, _, config = name.partition(":")
    try:
        loaded = load_dataset(repo_id, config or None)
    except Exception as error:  # the Hub client raises many types: offline, not found, gated, unknown format
        if "Config name is missing" in str(error):
            configs = ", ".join(get_dataset_config_names(repo_id))
            hint = f"give --dataset-name {repo_id}:config"
            raise UserError(f"--dataset-name {repo_id} has several configurations ({configs}): {hint}") from None
        raise UserError(f"--dataset-name {name} cannot be loaded: {first_line(error)}") from None
    return with_our_columns(loaded, f"--dataset-name {name}")


def with_our_columns(loaded: DatasetDict, source: str) -> tuple[DatasetDict, dict[int, str]]:
    """Return a dataset with our columns, and class number -> class name.

    It is made of the first Image column, the first ClassLabel column or the first column of LABEL_KEYS, the captions
    and the splits. If there is no `validation` split with a label for every photo, validation photos are chosen among
    the training photos.

    Args:
        source: the flag and its value, for messages.

    Raises:
        UserError: there are no images, some training photos have no label, or the name of a class has a control
            character.
    """
    loaded = with_image_column(loaded, source)
    splits = {}
    for name in sorted(loaded, key=lambda name: name.lower() not in SPLIT_FOLDERS):  # exact names first
        if (split := split_named(name) or name) in splits:
            print(f"notice: the split {name} of {source} is not used: {splits[split]} is its {split} split")
        else:
            splits[split] = name
    train = splits.get("train", next(iter(loaded)))
    features = loaded[train].features
    image = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
    if image is None:
        raise UserError(f"{source} has no image column: its columns are {', '.join(features)}")
    label = next(
        (name for name, feature in features.items() if isinstance(feature, ClassLabel)),
        next((name for name in LABEL_KEYS if name in features), None),
    )
    caption = next((name for name in CAPTION_KEYS if name in features), None)
    if not has_labels(loaded[train], label):
        raise UserError(
            f"{source}: some photos of its {train} split have no {label}: use a dataset in which every photo has one"
        )
    kept = {"train": train}
    for split in ("validation", "test"):
        if (name := splits.get(split, train)) != train:
            part = loaded[name]
            same_kind = label is None or type(part.features.get(label)) is type(features[label])
            if image in part.features and has_labels(part, label) and same_kind:
                kept[split] = name
            else:
                print(f"notice: the split {name} of {source} is not used: it lacks images, or labels of the same kind")
    values = {split: loaded[name][label][:] if label else ["photo"] * len(loaded[name]) for split, name in kept.items()}
    if isinstance(features.get(label), ClassLabel):
        names = {split: loaded[kept[split]].features[label].int2str(part) for split, part in values.items()}
        numbers = dict(enumerate(features[label].names, 1))
    else:
        names = {split: [str(value) for value in part] for split, part in values.items()}
        _, numbers = number_classes({name for part in names.values() for name in part}, {})
    require_class_names(numbers, source)
    photos = DatasetDict()
    for split, name in kept.items():
        part = photos_of_split(loaded[name], name, image, caption, names[split] if label else None)
        photos[split] = labelled(part, names[split], list(numbers.values()))
    if "validation" not in kept:
        photos = DatasetDict(photos | with_split(photos["train"]))
    return photos, numbers


def with_image_column(loaded: DatasetDict, source: str) -> DatasetDict:
    """Return the dataset with an Image column. Tables of other programs hold photos as plain bytes.

    Without an Image column, the first column of bytes, or of objects with bytes, becomes one.

    Raises:
        UserError: the column cannot be read as images.
    """
    features = next(iter(loaded.values())).features
    if any(isinstance(feature, Image) for feature in features.values()):
        return loaded
    for name, feature in features.items():
        holds_bytes = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
        if holds_bytes or (isinstance(feature, dict) and "bytes" in feature):
            try:
                return DatasetDict(
                    {
                        split: part.cast_column(name, Image()) if name in part.features else part
                        for split, part in loaded.items()
                    }
                )
            except Exception as error:  # pyarrow raises many types
                raise UserError(f"{source}: its column {name} cannot be read as images ({first_line(error)})") from None
    return loaded


def photos_of_split(
    part: Dataset, split: str, image: str, caption: str | None, class_names: list[str] | None
) -> Dataset:
    """Return the columns image, caption and file_name of a split.

    Args:
        image, caption: the names of its columns. A split without the caption column has default captions.
        class_names: the class of each photo, or None.
    """
    captions = [default_caption(name) for name in class_names or [None] * len(part)]
    if caption in part.features:
        captions = list(map(first_caption, part[caption][:]))
    files = part["file_name"][:] if "file_name" in part.features else []
    if not all(isinstance(file, str) for file in files) or len(set(files)) < len(part):
        files = [f"{split}/{i:07d}" for i in range(len(part))]
    part = part.select_columns([image])
    part = part if image == "image" else part.rename_column(image, "image")
    return part.add_column("caption", captions).add_column("file_name", files)


def first_caption(captions: str | list[str] | None) -> str:
    """Return the caption of a photo, or the first one of several."""
    return str(captions[0] if isinstance(captions, list) and captions else captions or "")


def has_labels(part: Dataset, label: str | None) -> bool:
    """Return whether every photo of a split has a label. Test splits on the Hub often have no labels, or only -1."""
    return label is None or (label in part.features and not any(value in (None, -1) for value in part[label][:]))
