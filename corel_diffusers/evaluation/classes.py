"""Scores of each class."""

import torch

from corel_diffusers.config.checks import MIN_PHOTOS
from corel_diffusers.evaluation.metrics import class_match, compare

Labelled = tuple[torch.Tensor, torch.Tensor]  # features (N, D) and labels (N,)


def class_scores(
    class_names: list[str], samples: Labelled, train: Labelled, photos: Labelled, held_out: Labelled | None
) -> dict[str, dict]:
    """Return the results of `compare` and the class accuracy for each class.

    The samples of a class are compared with its held-out photos. If fewer than MIN_PHOTOS of them are held out, the
    samples are compared with all photos of the class. The key `against` says which. All photos include training photos.
    A model that copies training photos has a lower distance to them.

    The key `match` is the class accuracy: the fraction of samples that are closest to the mean training photo of their
    own class. `match_photos` is the same fraction of the held-out photos, or None if the class has no held-out photos.

    A class with fewer than two samples or two photos is left out.
    """
    matches = class_match(*samples, *train)
    photo_matches = class_match(*held_out, *train) if held_out else None
    scores = {}
    for label, name in enumerate(class_names):
        of_class = samples[1] == label
        held_out_of_class = held_out[1] == label if held_out else torch.zeros(0, dtype=torch.bool)
        enough = held_out_of_class.sum() >= MIN_PHOTOS
        compared_photos = held_out[0][held_out_of_class] if enough else photos[0][photos[1] == label]
        if of_class.sum() < 2 or len(compared_photos) < 2:
            continue
        match_photos = None
        if held_out_of_class.any():
            match_photos = float(photo_matches[held_out_of_class].double().mean())
        scores[name] = compare(samples[0][of_class], compared_photos) | {
            "against": "held-out" if enough else "all",
            "match": float(matches[of_class].double().mean()),
            "match_photos": match_photos,
        }
    return scores
