"""Distances between two sets of pictures, as pure functions of their features: float64 (N, D) each.

All of them are meant for small sets: the kernel distance is unbiased at any size and comes with an interval; the Fréchet
distance is biased upwards at few pictures and therefore always shown with their number.
"""

import numpy as np
import torch


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(x.y / D + 1)^3 of all pairs -> (N, M) (Bińkowski et al. 2018, arXiv:1801.01401, section 4)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(a: torch.Tensor, b: torch.Tensor, paired: bool = False) -> float:
    """KID: the unbiased squared maximum mean discrepancy over all pairs (Gretton et al. 2012, eq. 3). May be below 0.

    paired: a[i] was made from b[i]. Such pairs are left out: they are more alike than pictures of the two kinds are, and few sets
    are so large that they would not count.
    """
    ones_a, ones_b = torch.ones(1, len(a)).to(a), torch.ones(1, len(b)).to(b)
    return float(weighted_distance(kernel(a, a), kernel(b, b), kernel(a, b), ones_a, ones_b, paired))


def weighted_distance(
    aa: torch.Tensor, bb: torch.Tensor, ab: torch.Tensor, weights_a: torch.Tensor, weights_b: torch.Tensor, paired: bool
) -> torch.Tensor:
    """KID of R resamplings, given the kernels of all pairs: weights (R, N) and (R, M) count each picture -> (R,).

    A picture is never paired with itself, however often it was drawn: that keeps resampled values centred on the unbiased one.
    """

    def apart(k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        total = ((w @ k) * w).sum(1) - w.square() @ k.diagonal()
        return total / (w.sum(1).square() - w.square().sum(1))

    between = apart(ab, weights_a) if paired else ((weights_a @ ab) * weights_b).sum(1) / (weights_a.sum(1) * weights_b.sum(1))
    return apart(aa, weights_a) + apart(bb, weights_b) - 2 * between


def kernel_interval(
    a: torch.Tensor, b: torch.Tensor, paired: bool = False, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """The bootstrap percentile interval of `kernel_distance`, both sets resampled (Efron & Tibshirani 1993, chapter 13).

    Of two sets that are alike it is wider than it need be.
    """
    rng = np.random.default_rng(0)
    weights_a, weights_b = (torch.from_numpy(rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)).to(x) for x in (a, b))
    weights_b = weights_a if paired else weights_b
    values = weighted_distance(kernel(a, a), kernel(b, b), kernel(a, b), weights_a, weights_b, paired)
    values = values[values.isfinite()]  # of very few pictures, a resampling may hold one picture only
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail]).to(values))
    return float(low), float(high)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    The trace of the root is the sum of the singular values of A B^T, A and B being the centred features over sqrt(n - 1): exact
    where there are fewer pictures than feature values and the covariances have no full rank. Of more pictures than values, the
    triangular factor stands for all.
    """
    centred_a, centred_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    small_a, small_b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (centred_a, centred_b))
    root = torch.linalg.svdvals(small_a @ small_b.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + centred_a.square().sum() + centred_b.square().sum() - 2 * root)


def precision_recall(pictures: torch.Tensor, photos: torch.Tensor, paired: bool = False, neighbour: int = 3) -> tuple[float, float]:
    """Share of pictures among the photos, and of photos among the pictures (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1).

    One set's region is the union of balls around its members, each as wide as its k-th nearest neighbour is far. Both shares depend
    on how many there are. paired: a picture's own photo does not count.
    """

    def share_inside(points: torch.Tensor, region: torch.Tensor) -> float:
        k = min(neighbour, len(region) - 1)
        radius = torch.cdist(region, region).kthvalue(k + 1, dim=1).values  # the first is the member itself
        distance = torch.cdist(points, region)
        if paired:
            distance.fill_diagonal_(float("inf"))
        return float((distance <= radius).any(1).double().mean())

    return share_inside(pictures, photos), share_inside(photos, pictures)


def within_class_distance(features: torch.Tensor, labels: torch.Tensor | None) -> float:
    """Mean distance of two members of one class, averaged over classes: low where the pictures of a class are all alike. Without labels
    all are of one class."""
    classes = [features] if labels is None else [features[labels == label] for label in labels.unique()]
    means = [torch.pdist(members).mean() for members in classes if len(members) > 1]
    return float(torch.stack(means).mean()) if means else float("nan")


def class_match(features: torch.Tensor, labels: torch.Tensor, photos: torch.Tensor, photo_labels: torch.Tensor) -> torch.Tensor:
    """Whether each picture is nearer (cosine) to the mean photo of its own class than to that of any other -> (N,) bool."""
    centre = photos.mean(0)
    means = torch.stack([(photos[photo_labels == label] - centre).mean(0) for label in photo_labels.unique()])
    nearest = torch.nn.functional.normalize(features - centre, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    return photo_labels.unique()[nearest.argmax(1)] == labels


def colour_statistics(pictures: np.ndarray) -> dict[str, float]:
    """uint8 (N, H, W, 3) -> mean of each channel, contrast (spread of a picture's values) and colourfulness, on 0 to 255.

    Colourfulness is that of Hasler & Süsstrunk 2003, averaged over pictures.
    """
    found = []
    for picture in pictures:
        values = picture.astype(np.float64)
        opponents = values[..., 0] - values[..., 1], (values[..., 0] + values[..., 1]) / 2 - values[..., 2]
        spread = np.sqrt(sum(o.var() for o in opponents)) + 0.3 * np.sqrt(sum(o.mean() ** 2 for o in opponents))
        found.append([*values.mean((0, 1)), values.std(), spread])
    names = ("red", "green", "blue", "contrast", "colourfulness")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def compare(a: torch.Tensor, b: torch.Tensor, paired: bool = False) -> dict[str, float]:
    """Every distance of two sets, KID times 1000, under the names that evaluation.json has. paired: a[i] was made from b[i]."""
    low, high = kernel_interval(a, b, paired)
    precision, recall = precision_recall(a, b, paired)
    return {
        "n": [len(a), len(b)], "kid_e3": kernel_distance(a, b, paired) * 1e3, "kid_e3_low": low * 1e3, "kid_e3_high": high * 1e3,
        "fd": frechet_distance(a, b), "precision": precision, "recall": recall,
    }  # fmt: skip


def halves(features: torch.Tensor, splits: int = 10) -> dict[str, float]:
    """`compare` of two random halves of one set, averaged over splits: what no model can beat."""
    rng = np.random.default_rng(0)
    found: list[dict] = []
    for _ in range(splits):
        first, second = np.array_split(rng.permutation(len(features)), 2)
        found.append(compare(features[first], features[second]))
    return {name: np.mean([values[name] for values in found], axis=0).tolist() for name in found[0]}
