"""Corel-5K: photos 1000.jpeg to 384096.jpeg, with the files `words` and `training_label` beside them.

The number of a photo is the number of its CD, followed by three digits. The photos of a CD have one theme.
`training_label` has lines "<photo> <word> <word> …", and each word is a line number of `words`, from 1.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from corel_diffusers.files import UserError

NAME = r"([1-9]\d{3,5})"  # of a photo, without its ending
WORDS_IN_NAME = 2  # words in the name of a class; more if two classes would have the same name


def is_corel_5k(stems: Sequence[str], folder: Path) -> bool:
    """Return whether the names, without their endings, are those of Corel-5K: CD number and three digits below 100."""
    numbers = [int(stem) for stem in stems if re.fullmatch(NAME, stem)]
    if len(numbers) < 0.9 * len(stems) or not numbers:
        return False
    several_discs = len({number // 1000 for number in numbers}) > 1 and all(number % 1000 < 100 for number in numbers)
    return several_discs or (folder / "training_label").is_file()


def read_words(folder: Path) -> dict[str, list[str]]:
    """Return photo (without its ending) -> words. Empty if the folder lacks `words` or `training_label`.

    Raises:
        UserError: a line of `training_label` is not valid.
    """
    words_file, labels_file = folder / "words", folder / "training_label"
    if not words_file.is_file() or not labels_file.is_file():
        return {}
    words = words_file.read_text(encoding="utf-8", errors="replace").split()
    found = {}
    for number, line in enumerate(labels_file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        photo, *indices = line.split() or [""]
        if not all(index.isdecimal() and 1 <= int(index) <= len(words) for index in indices):
            expected = f"'<photo> <numbers of words, from 1 to {len(words)}>'"
            raise UserError(f"{labels_file} line {number}: {line.strip()!r} is not {expected}")
        if photo:
            found[photo] = [words[int(index) - 1] for index in indices]
    return found


def class_names(words_of_disc: dict[int, list[list[str]]]) -> dict[int, str]:
    """Return CD number -> name: the words that most of its photos share, and that are rare on other CDs.

    Args:
        words_of_disc: CD number -> the words of each of its photos. A CD without words has its number as its name.
    """
    total = Counter(word for photos in words_of_disc.values() for words in photos for word in set(words))
    num_photos = sum(map(len, words_of_disc.values()))
    ranked: dict[int, list[str]] = {}
    for disc, photos in words_of_disc.items():
        counts = Counter(word for words in photos for word in set(words))
        # the share of the CD's photos that have the word, less the share of all photos that have it
        score = {word: count / len(photos) - total[word] / num_photos for word, count in counts.items()}
        ranked[disc] = sorted(score, key=lambda word: (-score[word], word))
    names = {}
    for length in range(WORDS_IN_NAME, WORDS_IN_NAME + 3):
        by_name = defaultdict(list)
        for disc, words in ranked.items():
            if disc not in names:
                by_name[frozenset(words[:length])].append(disc)
        names |= {discs[0]: " ".join(ranked[discs[0]][:length]) for discs in by_name.values() if len(discs) == 1}
    return {disc: names.get(disc) or f"{' '.join(ranked[disc][:WORDS_IN_NAME])} {disc}".strip() for disc in ranked}
