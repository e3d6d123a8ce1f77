"""Distances between two sets of pictures, as pure functions of their features: float64 (N, D) each.

All of them are meant for small sets: the kernel distance is unbiased at any size and comes with an interval; the Fréchet
distance is biased upwards at few pictures and therefore always shown with their number.
"""

import numpy as np
import scipy.special
import torch

UNKNOWN_PAIRS = 0.01  # of all pairs: so many of one class that the photos hold no example of bias KID by a unit or two of x1000


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(x.y / D + 1)^3 of all pairs -> (N, M) (Bińkowski et al. 2018, arXiv:1801.01401, section 4)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(
    a: torch.Tensor,
    b: torch.Tensor,
    paired: bool = False,
    labels_a: torch.Tensor | None = None,
    labels_b: torch.Tensor | None = None,
) -> float | None:
    """KID: the unbiased squared maximum mean discrepancy over all pairs (Gretton et al. 2012, eq. 3). May be below 0.

    labels_a (N,), labels_b (M,): the class of each picture. Without them the pictures count as drawn at random. Pictures that come in
    fixed numbers a class do not: within such a set fewer pairs are of one class than between two sets, and a perfect model would seem
    to be nearer than real photos are. With labels, `pair_weights` counts each pair of classes as often within as between.

    paired: a[i] was made from b[i], and has its label. Such pairs are left out: they are more alike than pictures of the two kinds are,
    and few sets are so large that they would not count.

    None where the labels leave it open: see `countable`.
    """
    if not countable(labels_b if paired else labels_a, labels_b):
        return None
    values, weights, _ = all_pairs(a, b, paired, labels_a, labels_b)
    return float((weights * values).sum())


def countable(labels_a: torch.Tensor | None, labels_b: torch.Tensor | None) -> bool:
    """Whether KID can be told: with labels, where there is a pair of classes that both sets have; with those of b alone, where few of its
    classes have one photo only. Of such a class nothing is known about two of its photos, which a's pictures may well be."""
    if labels_b is None:
        return True
    classes, count_b = labels_b.unique(return_counts=True)
    if labels_a is None:
        return int((count_b == 1).sum()) <= UNKNOWN_PAIRS * len(labels_b) ** 2
    count_a = (labels_a[:, None] == classes).sum(0)
    return int((count_a > 0).sum()) > 1 or bool(((count_a > 1) & (count_b > 1)).any())


def kernel_interval(
    a: torch.Tensor,
    b: torch.Tensor,
    paired: bool = False,
    labels_a: torch.Tensor | None = None,
    labels_b: torch.Tensor | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval of `kernel_distance` over repeated draws of both sets, by a multiplier bootstrap.

    KID is a U-statistic, sum_pq w_pq k(x_p, x_q). Around its mean it varies like 2 sum_p l_p + sum_pq w_pq k~(x_p, x_q) (Hoeffding 1948):
    l_p is the centred sum_q w_pq k_pq, which is 0 on average where the sets are alike; k~ is the kernel, centred on both sides. With
    standard normal e_p, 2 sum_p l_p e_p + sum_pq w_pq k~_pq e_p e_q has the same variance and skewness. That holds as well where the first
    part is 0, and where drawing the pictures again with replacement would give an interval that is twice too wide (Chwialkowski et al.
    2014, arXiv:1408.5404). Where the pictures come in fixed numbers per class, everything is centred within the classes.

    A KID that the second part alone explains says that the sets may be alike. What is read off them for the first part is then mostly
    chance, and the second part alone gives the interval.
    """
    values, weights, strata = all_pairs(a, b, paired, labels_a, labels_b)
    member = (strata[:, None] == strata.unique()).to(values)
    count = member.sum(0)
    distance, tail = float((weights * values).sum()), (1 + level) / 2
    quantiles = torch.tensor([1 - tail, tail]).to(values)
    draws = torch.randn(resamples, len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(values)
    products = weights * centred_kernel(values, member)
    second = ((draws @ products) * draws).sum(1)
    low, high = torch.quantile(second, quantiles).tolist()
    if distance <= high:
        return distance - high, distance - low

    pull = (weights * values).sum(1)
    pull = (pull - member @ (member.T @ pull / count)) * (member @ (count / (count - 1).clamp_min(1)).sqrt())
    # what is read off the sample for the first part holds the second part's variance twice
    by_stratum = 4 * member.T @ pull.square()
    variance = by_stratum.sum()
    share = ((variance - 4 * products.square().sum()) / variance.clamp_min(1e-30)).clamp_min(0).sqrt()
    # of few pictures the variance itself is uncertain: Student's t, with the degrees of freedom of Satterthwaite 1946
    freedom = float(variance.square() / (by_stratum.square() / (count - 1).clamp_min(1)).sum().clamp_min(1e-30))
    share = share * float(scipy.special.stdtrit(max(freedom, 1.0), tail) / scipy.special.ndtri(tail))
    low, high = torch.quantile(2 * share * (draws @ pull) + second, quantiles).tolist()
    return distance + low, distance + high


def centred_kernel(values: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """The kernel less its means over the strata of both pictures, (P, P), 0 on the diagonal, so scaled that its mean square is unbiased.

    member (P, S): 0 or 1. Within a stratum no picture counts with itself, in the means either: U-centring (Székely & Rizzo 2014,
    arXiv:1310.2926, section 2), which needs four pictures; with fewer that block is 0.
    """
    count, same = member.sum(0), torch.eye(member.shape[1]).to(values)
    apart = values.clone().fill_diagonal_(0)
    rows = apart @ member  # (P, S): sums over each stratum
    ones = torch.ones_like(same)
    means = rows * (member @ (1 / (count * ones - 2 * same).clamp_min(1)))
    pairs = torch.outer(count, count) * (1 - same) + torch.diag((count - 1) * (count - 2)).clamp_min(0)
    blocks = (member.T @ rows) / pairs.clamp_min(1)
    by_row = means @ member.T
    unbiased = count / (count - 1).clamp_min(1)
    scale = torch.outer(unbiased, unbiased) * (1 - same) + torch.diag((count > 3) * (count - 1) / (count - 3).clamp_min(1))
    centred = apart - by_row - by_row.T + member @ blocks @ member.T
    return (centred * (member @ scale @ member.T).sqrt()).fill_diagonal_(0)


def all_pairs(
    a: torch.Tensor, b: torch.Tensor, paired: bool, labels_a: torch.Tensor | None, labels_b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KID as sum(weights * values): the kernel of each pair of pictures of either set, its weight, (P, P) each, and of each picture the
    stratum that it was drawn from at random, (P,). paired: a picture and its photo are one member."""
    strata_b = strata(labels_b, len(b))
    if paired:
        between = kernel(a, b)
        return kernel(a, a) + kernel(b, b) - between - between.T, pair_weights(labels_b, labels_b, len(b), len(b))[0].to(a), strata_b
    within_a, within_b, between = (weights.to(a) for weights in pair_weights(labels_a, labels_b, len(a), len(b)))
    both = torch.cat([a, b])
    weights = torch.cat([torch.cat([within_a, -between], 1), torch.cat([-between.T, within_b], 1)])
    return kernel(both, both), weights, torch.cat([strata(labels_a, len(a)), len(a) + strata_b])


def pair_weights(
    labels_a: torch.Tensor | None, labels_b: torch.Tensor | None, count_a: int, count_b: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much each pair counts, (N, N) within a, (M, M) within b, (N, M) between: 1 in all in each, and 0 for a picture with itself.

    With labels of both, each pair of classes counts by the classes' shares among b, as often within as between. One picture of a class
    tells nothing of two of that class: then that pair of classes is left out of all three. Where only b is labelled, its classes count by
    their shares in it, since a's pictures have them at random.
    """
    if labels_a is None or labels_b is None:
        a, b = strata(labels_a, count_a), strata(labels_b, count_b)
        member_a, member_b = ((x[:, None] == x.unique()).double() for x in (a, b))
        shares_a, shares_b = member_a.mean(0), member_b.mean(0)
        between = torch.full((count_a, count_b), 1 / (count_a * count_b), dtype=torch.float64)
        return spread(member_a, torch.outer(shares_a, shares_a)), spread(member_b, torch.outer(shares_b, shares_b)), between
    classes = labels_b.unique()
    member_a, member_b = ((labels[:, None] == classes).double() for labels in (labels_a, labels_b))
    count_a, count_b = member_a.sum(0), member_b.sum(0)
    shares = count_b * (count_a > 0)
    counted = torch.outer(shares, shares)
    counted[torch.eye(len(classes), dtype=torch.bool) & ((count_a < 2) | (count_b < 2))] = 0
    counted = counted / counted.sum()
    between = member_a @ (counted / (count_a[:, None] * count_b).clamp_min(1)) @ member_b.T
    return spread(member_a, counted), spread(member_b, counted), between


def spread(member: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The weight of each pair of classes (S, S), spread evenly over the pairs of their members, (N, S) 0 or 1 -> (N, N)."""
    count = member.sum(0)
    pairs = torch.outer(count, count) - torch.diag(count)
    return (member @ (counted / pairs.clamp_min(1)) @ member.T).fill_diagonal_(0)


def strata(labels: torch.Tensor | None, count: int) -> torch.Tensor:
    """Numbers from 0 for the classes, those of one picture taken together, with the smallest other where there is one only: within a
    stratum, at least two are needed. Without labels all are of one."""
    if labels is None:
        return torch.zeros(count, dtype=torch.long)
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    alone = counts < 2
    if alone.sum() == 1 and len(counts) > 1:
        alone |= counts == counts[~alone].min()
    numbers = torch.where(alone, len(counts), torch.arange(len(counts)))
    return numbers[place].unique(return_inverse=True)[1]


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


def compare(
    a: torch.Tensor,
    b: torch.Tensor,
    paired: bool = False,
    labels_a: torch.Tensor | None = None,
    labels_b: torch.Tensor | None = None,
) -> dict[str, float | None]:
    """Every distance of two sets, KID times 1000, under the names that evaluation.json has. Labels: as `kernel_distance` takes them.

    paired: a[i] was made from b[i]. There is no Fréchet distance then: both sets would share the chance that chose the photos, and it
    would come out far too low.
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


def halves(features: torch.Tensor, labels: torch.Tensor | None = None, splits: int = 100, compared: int = 10) -> dict[str, float | None]:
    """What no model can beat: one half of a set against the other, split at random within each class.

    Means over splits; the interval of KID is what 95 % of the splits lie within, which is how far a perfect model of such few pictures
    is from 0. Only the first splits are `compared` in all; `labels` as `kernel_distance` takes them.
    """
    rng = np.random.default_rng(0)
    classes = np.zeros(len(features)) if labels is None else labels.numpy()
    found, distances = [], []
    for split in range(splits):
        order = rng.permutation(len(features))
        order = order[np.argsort(classes[order], kind="stable")]  # by class, at random within: every second one is a half of each class
        first, second = order[::2], order[1::2]
        of_both = [None, None] if labels is None else [labels[first], labels[second]]
        distance = kernel_distance(features[first], features[second], False, *of_both)
        distances += [] if distance is None else [1e3 * distance]
        if split < compared:
            found.append(compare(features[first], features[second], False, *of_both))
    means = {name: np.mean([values[name] for values in found], axis=0).tolist() for name in ("n", "fd", "precision", "recall")}
    middle = [np.mean(distances), *np.quantile(distances, (0.025, 0.975))] if distances else [None] * 3
    kid = dict(zip(("kid_e3", "kid_e3_low", "kid_e3_high"), middle, strict=True))
    return means | {name: None if value is None else float(value) for name, value in kid.items()}
