"""The list of the photos that a model was trained on."""

from collections.abc import Sequence
from pathlib import Path

TRAINING_PHOTOS = "training_photos.txt"  # in the run folder: the names of the photos that the model is trained on


def training_photos(model: Path | str) -> list[str]:
    """Return the names of the photos that the model was trained on.

    The list is empty if they are unknown, for example if `model` is a Hub id.
    """
    listed = Path(model) / TRAINING_PHOTOS
    return listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []


def count_trained_on(model: Path | str, names: Sequence[str]) -> int:
    """Return how many of the named photos the model was trained on.

    After a new split of the photos, some held-out photos can be former training photos.

    `prepare` makes the folder a part of the file name and may change the extension. The same photo is recognised before
    and after `prepare`. It is not recognised if its name was too long for a file: `prepare` replaces such a name with a
    hash.
    """

    def stems(files: Sequence[str]) -> set[str]:
        return {str(Path(name.replace("/", "_")).with_suffix("")) for name in files}

    return len(stems(names) & stems(training_photos(model)))
