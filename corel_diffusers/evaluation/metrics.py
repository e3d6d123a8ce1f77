"""Distances between two sets of images, as pure functions of their features: float64 (N, D) for each set.

All of them are for small sets. The kernel distance (kid.py) is unbiased at any size and comes with an interval. The
Fréchet distance is biased upwards for few images, so it is always shown with the number of images.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional as F

from corel_diffusers.evaluation.kid import kernel_distance, kernel_interval


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    Let A and B be the centred features divided by sqrt(n - 1). The trace of the root is the sum of the singular values
    of A B^T. This is exact even with fewer images than feature dimensions, when the covariances do not have full rank.
    With more images than dimensions, the smaller triangular factor of the QR decomposition replaces A or B. It gives
    the same singular values.
    """
    centred_a, centred_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    small_a, small_b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (centred_a, centred_b))
    root_trace = torch.linalg.svdvals(small_a @ small_b.T).sum()
    return float(
        (a.mean(0) - b.mean(0)).square().sum() + centred_a.square().sum() + centred_b.square().sum() - 2 * root_trace
    )


def precision_recall(
    samples: torch.Tensor, photos: torch.Tensor, paired: bool = False, neighbour: int = 3
) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1).

    Precision is the fraction of samples inside the region of the photos. Recall is the fraction of photos inside the
    region of the samples. The region of a set is the union of balls around its images. The radius of each ball is the
    distance to the k-th nearest neighbour. Both values depend on the number of images.

    paired: samples[i] was made from photos[i]. This pair does not count.
    """

    def fraction_inside(points: torch.Tensor, region: torch.Tensor) -> float:
        k = min(neighbour, len(region) - 1)
        radius = torch.cdist(region, region).kthvalue(k + 1, dim=1).values  # the nearest is the image itself
        distance = torch.cdist(points, region)
        if paired:
            distance.fill_diagonal_(float("inf"))
        return float((distance <= radius).any(1).double().mean())

    return fraction_inside(samples, photos), fraction_inside(photos, samples)


def within_class_distance(features: torch.Tensor, labels: torch.Tensor | None) -> float:
    """Return the mean distance between two images of the same class, averaged over the classes.

    It is low if the images of a class are all alike. Without labels, all images are one class.
    """
    classes = [features] if labels is None else [features[labels == label] for label in labels.unique()]
    means = [torch.pdist(members).mean() for members in classes if len(members) > 1]
    return float(torch.stack(means).mean()) if means else float("nan")


def class_match(
    features: torch.Tensor, labels: torch.Tensor, photos: torch.Tensor, photo_labels: torch.Tensor
) -> torch.Tensor:
    """Return whether each image is closer to the mean photo of its own class than to that of any other class.

    The measure is the cosine similarity of the features. Returns bool (N,).
    """
    classes, centre = photo_labels.unique(), photos.mean(0)
    class_means = torch.stack([(photos[photo_labels == label] - centre).mean(0) for label in classes])
    similarity = F.normalize(features - centre, dim=1) @ F.normalize(class_means, dim=1).T
    return classes[similarity.argmax(1)] == labels


def colour_statistics(images: Iterable[np.ndarray]) -> dict[str, float]:
    """Return the mean of each channel, the contrast and the colourfulness of uint8 images (N, H, W, 3).

    All values are averaged over the images, on the scale from 0 to 255. Contrast is the standard deviation of all
    values of an image. Colourfulness is that of Hasler & Süsstrunk 2003.
    """
    statistics = []
    for image in images:
        values = image.astype(np.float64)
        opponents = values[..., 0] - values[..., 1], (values[..., 0] + values[..., 1]) / 2 - values[..., 2]
        colourfulness = np.sqrt(sum(o.var() for o in opponents)) + 0.3 * np.sqrt(sum(o.mean() ** 2 for o in opponents))
        statistics.append([*values.mean((0, 1)), values.std(), colourfulness])
    names = ("red", "green", "blue", "contrast", "colourfulness")
    return dict(zip(names, np.mean(statistics, axis=0).tolist(), strict=True))


def compare(
    a: torch.Tensor,
    b: torch.Tensor,
    paired: bool = False,
    labels_a: torch.Tensor | None = None,
    labels_b: torch.Tensor | None = None,
) -> dict[str, float | None]:
    """Return all distances of two sets, with their keys in evaluation.json. KID is multiplied by 1000.

    The labels are those of `kernel_distance`.

    paired: a[i] was made from b[i]. The Fréchet distance is then None. Both sets share the random choice of the photos,
        so the Fréchet distance would be far too low.
    """
    distance, interval = kernel_distance(a, b, paired, labels_a, labels_b), (None, None)
    if distance is not None:
        interval = kernel_interval(a, b, paired, labels_a, labels_b)
    precision, recall = precision_recall(a, b, paired)
    kid = {"kid_e3": distance, "kid_e3_low": interval[0], "kid_e3_high": interval[1]}
    return {
        "n": [len(a), len(b)],
        **{name: None if value is None else 1e3 * value for name, value in kid.items()},
        "fd": None if paired else frechet_distance(a, b),
        "precision": precision,
        "recall": recall,
    }


def halves(
    features: torch.Tensor, labels: torch.Tensor | None = None, num_splits: int = 100, num_compared: int = 10
) -> dict[str, float | None]:
    """Return the mean distances between two random halves of a set. No model can be expected to be better.

    Each class is split into two halves at random. The interval of KID contains 95 % of the splits. It shows how far
    from 0 the KID of a perfect model can be with this number of images.

    Args:
        features: (N, D).
        labels: those of `kernel_distance`.
        num_splits: the number of splits for KID.
        num_compared: the number of splits for the other distances.
    """
    rng = np.random.default_rng(0)
    classes = np.zeros(len(features)) if labels is None else labels.numpy()
    comparisons, kids = [], []
    for split in range(num_splits):
        order = rng.permutation(len(features))
        # Sorted by class and random within a class: every second image is one half of each class.
        order = order[np.argsort(classes[order], kind="stable")]
        first, second = order[::2], order[1::2]
        both_labels = [None, None] if labels is None else [labels[first], labels[second]]
        kid = kernel_distance(features[first], features[second], False, *both_labels)
        kids += [] if kid is None else [1e3 * kid]
        if split < num_compared:
            comparisons.append(compare(features[first], features[second], False, *both_labels))
    names = ("n", "fd", "precision", "recall")
    means = {name: np.mean([values[name] for values in comparisons], axis=0).tolist() for name in names}
    mean_and_interval = [np.mean(kids), *np.quantile(kids, (0.025, 0.975))] if kids else [None] * 3
    kid_values = dict(zip(("kid_e3", "kid_e3_low", "kid_e3_high"), mean_and_interval, strict=True))
    return means | {name: None if value is None else float(value) for name, value in kid_values.items()}
