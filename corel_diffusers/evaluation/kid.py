"""KID, the kernel inception distance, with its interval.

A stratum is a set of images that were drawn at random: a class, or all classes with a single image together.
"""

import scipy.special
import torch

# Maximum probability that two random images are of the same class and this class has only one photo. At this
# probability, the bias of KID x1000 is a few units.
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
            more similar than other pairs of the two sets. Most sets are small, so these pairs would change the result.
        labels_a: (N,), the class of each image of a.
        labels_b: (M,), the class of each image of b.
    """
    if not countable(labels_b if paired else labels_a, labels_b):
        return None
    values, weights, _ = all_pairs(a, b, paired, labels_a, labels_b)
    return float((weights * values).sum())


def countable(labels_a: torch.Tensor | None, labels_b: torch.Tensor | None) -> bool:
    """Return whether the labels allow an unbiased KID.

    With labels of both sets, they need two classes in common, or one class with two images in each set. With labels of
    b only, few classes of b may have a single photo. Two samples can be of such a class, but b does not show how
    similar two photos of the class are.
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
