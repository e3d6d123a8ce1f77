"""Build the columns that every dataset of photos has."""

from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value


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


def labelled(photos: Dataset, names: Sequence[str], class_names: list[str]) -> Dataset:
    """Return `photos` with a ClassLabel column `label`, from the class name of each photo (`names`)."""
    photos = photos.remove_columns("label") if "label" in photos.column_names else photos
    photos = photos.add_column("label", [class_names.index(name) for name in names])
    return photos.cast_column("label", ClassLabel(names=class_names))


def with_bytes(photos: Dataset, file: Path) -> Dataset:
    """Return `photos` with the bytes of each image file in place of its path, written to the Arrow file `file`."""
    rows = photos.cast_column("image", Image(decode=False))

    def read(row: dict) -> dict:
        content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        return {"image": {"bytes": content, "path": row["file_name"]}}

    return rows.map(read, desc="reading photos", cache_file_name=str(file)).cast_column("image", Image())
