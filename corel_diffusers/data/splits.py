"""Split photos into train, validation and test."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset, DatasetDict

VALIDATION_FRACTION = 0.1
SPLITS = ("train", "validation", "test")  # train on, choose the best model with, only report on
SPLIT_SEED = 0  # not the training seed: both scripts must hold out the same photos, whatever their training seeds are


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


def complete_split(
    labels: Sequence,
    names: Sequence[str],
    given: Sequence[str | None],
    groups: Sequence | None = None,
    test_fraction: float = 0.0,
) -> list[str]:
    """Return the split of each photo: the given ones, and those of `split_photos` for what is missing.

    Without given splits, `split_photos` chooses all. If photos are given as train but none as validation, validation
    photos are chosen among them. In the same way, test photos are chosen if none are given and `test_fraction` is set.

    Args:
        given: "train", "validation", "test" or None for each photo.
    """
    split_names, present = [split or "train" for split in given], set(given)
    if "validation" in present and ("test" in present or not test_fraction):
        return split_names
    rows = [index for index, split in enumerate(split_names) if split == "train"]
    chosen = split_photos(
        [labels[index] for index in rows],
        [names[index] for index in rows],
        None if groups is None else [groups[index] for index in rows],
        test_fraction,
    )
    for index, split in zip(rows, chosen, strict=True):
        if split not in present:
            split_names[index] = split
    return split_names


def with_split(photos: Dataset, split_names: Sequence[str] | None = None) -> DatasetDict:
    """Divide a Dataset into its splits. The split `test` exists only if it has a photo.

    Args:
        split_names: the split of each photo. By default `split_photos` chooses it.
    """
    split_names = split_names or split_photos(photos["label"][:], photos["file_name"][:])
    rows_of = {split: [i for i, name in enumerate(split_names) if name == split] for split in SPLITS}
    return DatasetDict({split: photos.select(rows) for split, rows in rows_of.items() if rows or split != "test"})
