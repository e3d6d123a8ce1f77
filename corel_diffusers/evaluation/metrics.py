"""Distances between two sets of images, as pure functions of their features: float64 (N, D) for each set.

All of them are for small sets. The kernel distance (KID) is unbiased at any size and comes with an interval. The
Fréchet distance is biased upwards for few images, so it is always shown with the number of images.
"""

import numpy as np
import scipy.special
import torch

# Maximum fraction of pairs of one class of which the photos have no example. At this fraction, the bias of KID x1000
# is a few units.
UNKNOWN_PAIRS = 0.01


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return (x.y / D + 1)^3 for all pairs: (N, M) (Bińkowski et al. 2018, arXiv:1801.01401, section 4)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(
    a: torch.Tensor,
    b: torch.Tensor,
    paired: bool = False,
    labels_a: torch.Tensor | None = None,
    labels_b: torch.Tensor | None = None,
) -> float | None:
    """Return the KID: the unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3). It can be below 0.

    It is None if the labels do not allow an unbiased estimate: see `countable`.

    Without labels, the images count as drawn at random. This is wrong if a set has a fixed number of images per class.
    Fewer pairs within such a set are of the same class than pairs between two sets. Then a perfect model would seem to
    be closer to the photos than real photos are. With labels, `pair_weights` gives each pair of classes the same weight
    within the sets and between them.

    Args:
        a: features (N, D).
        b: features (M, D).
        paired: a[i] was made from b[i] and has the same label. The pairs (a[i], b[i]) are left out, because they are
            more similar than other pairs of the two sets. Few sets are so large that these pairs do not matter.
        labels_a: (N,), the class of each image of a.
        labels_b: (M,), the class of each image of b.
    """
    if not countable(labels_b if paired else labels_a, labels_b):
        return None
    values, weights, _ = all_pairs(a, b, paired, labels_a, labels_b)
    return float((weights * values).sum())


def countable(labels_a: torch.Tensor | None, labels_b: torch.Tensor | None) -> bool:
    """Return whether the labels allow an unbiased KID.

    With labels of both sets, they need a pair of classes in common. With labels of b only, few classes of b may have a
    single photo. Two samples can be of such a class, but b does not show how similar two photos of the class are.
    """
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
    """Return the interval of `kernel_distance` over repeated draws of both sets, by a multiplier bootstrap.

    KID is a U-statistic, sum_pq w_pq k(x_p, x_q). Its deviation from the mean is distributed like
    2 sum_p l_p + sum_pq w_pq k~(x_p, x_q) (Hoeffding 1948). In the linear term, l_p is the centred sum_q w_pq k_pq. Its
    expected value is 0 if the two distributions are the same. In the quadratic term, k~ is the kernel, centred on both
    sides.

    With standard normal e_p, 2 sum_p l_p e_p + sum_pq w_pq k~_pq e_p e_q has the same variance and skewness. This also
    holds if the linear term is 0. A bootstrap that draws the images again with replacement would then give an interval
    that is twice too wide (Chwialkowski et al. 2014, arXiv:1408.5404). If a set has a fixed number of images per class,
    all terms are centred within the classes.

    If the quadratic term alone explains the KID, the two distributions may be the same. The estimate of the linear term
    is then mostly noise, so the interval is that of the quadratic term alone.

    The parameters are those of `kernel_distance`.
    """
    values, weights, strata = all_pairs(a, b, paired, labels_a, labels_b)
    membership = (strata[:, None] == strata.unique()).to(values)  # (P, S)
    count = membership.sum(0)
    distance, upper_tail = float((weights * values).sum()), (1 + level) / 2
    quantiles = torch.tensor([1 - upper_tail, upper_tail]).to(values)
    multipliers = torch.randn(
        resamples, len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(values)
    weighted_kernel = weights * centred_kernel(values, membership)
    quadratic = ((multipliers @ weighted_kernel) * multipliers).sum(1)
    low, high = torch.quantile(quadratic, quantiles).tolist()
    if distance <= high:
        return distance - high, distance - low

    linear = (weights * values).sum(1)
    linear = (linear - membership @ (membership.T @ linear / count)) * (
        membership @ (count / (count - 1).clamp_min(1)).sqrt()
    )
    # The estimated variance of the linear term contains the variance of the quadratic term twice.
    stratum_variances = 4 * membership.T @ linear.square()
    variance = stratum_variances.sum()
    scale = ((variance - 4 * weighted_kernel.square().sum()) / variance.clamp_min(1e-30)).clamp_min(0).sqrt()
    # With few images, the variance itself is uncertain. So use Student's t, with the degrees of freedom of
    # Satterthwaite 1946.
    degrees_of_freedom = float(
        variance.square() / (stratum_variances.square() / (count - 1).clamp_min(1)).sum().clamp_min(1e-30)
    )
    scale = scale * float(
        scipy.special.stdtrit(max(degrees_of_freedom, 1.0), upper_tail) / scipy.special.ndtri(upper_tail)
    )
    low, high = torch.quantile(2 * scale * (multipliers @ linear) + quadratic, quantiles).tolist()
    return distance + low, distance + high


def centred_kernel(values: torch.Tensor, membership: torch.Tensor) -> torch.Tensor:
    """Return the kernel (P, P) minus its means over the strata of both images. The diagonal is 0.

    The result is scaled so that its mean square is unbiased. Within a stratum, pairs of an image with itself do not
    count, and the means do not contain them either: this is U-centring (Székely & Rizzo 2014, arXiv:1310.2926, section
    2). It needs four images in the stratum. With fewer images, the block of the stratum is 0.

    membership: (P, S), 1 if the image is in the stratum, otherwise 0.
    """
    count, same_stratum = membership.sum(0), torch.eye(membership.shape[1]).to(values)
    off_diagonal = values.clone().fill_diagonal_(0)
    stratum_sums = off_diagonal @ membership  # (P, S)
    ones = torch.ones_like(same_stratum)
    stratum_means = stratum_sums * (membership @ (1 / (count * ones - 2 * same_stratum).clamp_min(1)))
    num_pairs = torch.outer(count, count) * (1 - same_stratum) + torch.diag((count - 1) * (count - 2)).clamp_min(0)
    block_means = (membership.T @ stratum_sums) / num_pairs.clamp_min(1)
    row_means = stratum_means @ membership.T
    unbiased = count / (count - 1).clamp_min(1)
    scale = torch.outer(unbiased, unbiased) * (1 - same_stratum) + torch.diag(
        (count > 3) * (count - 1) / (count - 3).clamp_min(1)
    )
    centred = off_diagonal - row_means - row_means.T + membership @ block_means @ membership.T
    return (centred * (membership @ scale @ membership.T).sqrt()).fill_diagonal_(0)


def all_pairs(
    a: torch.Tensor, b: torch.Tensor, paired: bool, labels_a: torch.Tensor | None, labels_b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the terms of KID = sum(weights * values), and the strata. The images of both sets are together.

    With `paired`, an image and the photo that it was made from are one element, so P = N. Otherwise P = N + M.

    Returns:
        The kernel values of all pairs (P, P), their weights (P, P), and the stratum (P,) that each image was drawn
        from at random.
    """
    strata_b = strata_of(labels_b, len(b))
    if paired:
        between = kernel(a, b)
        return (
            kernel(a, a) + kernel(b, b) - between - between.T,
            pair_weights(labels_b, labels_b, len(b), len(b))[0].to(a),
            strata_b,
        )
    within_a, within_b, between = (weights.to(a) for weights in pair_weights(labels_a, labels_b, len(a), len(b)))
    both = torch.cat([a, b])
    weights = torch.cat([torch.cat([within_a, -between], 1), torch.cat([-between.T, within_b], 1)])
    return kernel(both, both), weights, torch.cat([strata_of(labels_a, len(a)), len(a) + strata_b])


def pair_weights(
    labels_a: torch.Tensor | None, labels_b: torch.Tensor | None, count_a: int, count_b: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weight of each pair: (N, N) within a, (M, M) within b, and (N, M) between a and b.

    Each of the three matrices sums to 1. The weight of an image with itself is 0.

    If both sets have labels, the weight of a pair of classes is the product of the class fractions in b. It is the same
    within the sets and between them. If a class has only one image in a set, that set has no pair of images within the
    class. Then all three matrices leave out the pairs within this class.

    If only b has labels, the pairs within b have the weights of its class fractions. The images of a have random
    classes, so all other pairs have equal weights.
    """
    if labels_a is None or labels_b is None:
        strata_a, strata_b = strata_of(labels_a, count_a), strata_of(labels_b, count_b)
        membership_a, membership_b = ((strata[:, None] == strata.unique()).double() for strata in (strata_a, strata_b))
        fractions_a, fractions_b = membership_a.mean(0), membership_b.mean(0)
        between = torch.full((count_a, count_b), 1 / (count_a * count_b), dtype=torch.float64)
        return (
            spread_weights(membership_a, torch.outer(fractions_a, fractions_a)),
            spread_weights(membership_b, torch.outer(fractions_b, fractions_b)),
            between,
        )
    classes = labels_b.unique()
    membership_a, membership_b = ((labels[:, None] == classes).double() for labels in (labels_a, labels_b))
    count_a, count_b = membership_a.sum(0), membership_b.sum(0)
    class_weights = count_b * (count_a > 0)
    block_weights = torch.outer(class_weights, class_weights)
    block_weights[torch.eye(len(classes), dtype=torch.bool) & ((count_a < 2) | (count_b < 2))] = 0
    block_weights = block_weights / block_weights.sum()
    between = membership_a @ (block_weights / (count_a[:, None] * count_b).clamp_min(1)) @ membership_b.T
    return spread_weights(membership_a, block_weights), spread_weights(membership_b, block_weights), between


def spread_weights(membership: torch.Tensor, block_weights: torch.Tensor) -> torch.Tensor:
    """Spread the weight of each pair of classes evenly over its pairs of images: (N, N).

    membership: (N, S), 1 if the image is in the class, otherwise 0. block_weights: (S, S).
    """
    count = membership.sum(0)
    num_pairs = torch.outer(count, count) - torch.diag(count)
    return (membership @ (block_weights / num_pairs.clamp_min(1)) @ membership.T).fill_diagonal_(0)


def strata_of(labels: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return the stratum of each image, numbered from 0: (count,). Without labels, there is one stratum.

    Each class is a stratum. A stratum needs at least two images, so the classes with a single image form one stratum
    together. If there is only one such class, the smallest of the other classes joins it (all of them in a tie).
    """
    if labels is None:
        return torch.zeros(count, dtype=torch.long)
    _, class_index, counts = labels.unique(return_inverse=True, return_counts=True)
    merged = counts < 2
    if merged.sum() == 1 and len(counts) > 1:
        merged |= counts == counts[~merged].min()
    numbers = torch.where(merged, len(counts), torch.arange(len(counts)))
    return numbers[class_index].unique(return_inverse=True)[1]


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
    centre = photos.mean(0)
    class_means = torch.stack([(photos[photo_labels == label] - centre).mean(0) for label in photo_labels.unique()])
    similarity = (
        torch.nn.functional.normalize(features - centre, dim=1) @ torch.nn.functional.normalize(class_means, dim=1).T
    )
    return photo_labels.unique()[similarity.argmax(1)] == labels


def colour_statistics(images: np.ndarray) -> dict[str, float]:
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
