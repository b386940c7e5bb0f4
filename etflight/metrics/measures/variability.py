"""NC1: how much the samples of a class vary, against how far classes are apart."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.measures.between import Between, between_classes
from etflight.metrics.measures.centring import GlobalMean, centred_means, has_samples, undefined
from etflight.metrics.statistics import Moments


def _root_pinv(between: Between) -> Tensor:
    """`X` with `(AᵀA)⁺ = X Xᵀ`."""
    reduced, q, r, singular = between
    if bool(singular.isnan().any()):
        return torch.full_like(reduced.T, math.nan)
    rank = int(singular.count_nonzero())
    if rank < len(singular):  # coinciding or dependent centres
        _, kept, right = torch.linalg.svd(reduced, full_matrices=False)
        root: Tensor = right[:rank].T / kept[:rank]
        return root
    if reduced.shape[0] <= reduced.shape[1]:
        root = torch.linalg.solve_triangular(r.T, q, upper=False, left=False)
    else:
        root = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    return root


def nc1(
    stats: Moments, *, divide_by_classes: bool = True, global_mean: GlobalMean = "class", correction: int = 0
) -> Tensor:
    r"""Within-class variability relative to the between-class one, `tr(Σ_W Σ_B⁺)/K`.

    Solved through a triangular factor of the K - 1 centred means (or, for K - 1 > d, of `Σ_B`), never through a d×d pseudo-inverse.
    Directions in which centres coincide to rounding are left out, as the pseudo-inverse does. Whether `Σ_W` is sample- or
    class-weighted was decided when it was collected (`ClassStatistics(class_counts=…)`).

    Args:
        stats: with the scatter.
        divide_by_classes: False gives Papyan's trace without 1/K.
        global_mean: how classes weigh in `μ_G`.
        correction: 1 makes `Σ_W` the unbiased pooled covariance, divided by N - K.

    Returns:
        Scalar >= 0; 0 under perfect collapse, NaN if all centres coincide.

    Raises:
        ValueError: statistics without scatter; a correction other than 0 for a class-weighted `Σ_W`.

    Source:
        Zhu et al. 2021, arXiv 2105.02375 (with 1/K); Papyan, Han & Donoho 2020 (without, sample-weighted).

    Example:
        >>> from etflight.metrics import ClassStatistics
        >>> statistics = ClassStatistics(num_classes=2, feature_dim=2)
        >>> features = torch.tensor([[0.9, 0.0], [1.1, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
        >>> statistics.update(features, torch.tensor([0, 0, 1, 1]))
        >>> round(nc1(statistics.compute()).item(), 6)
        0.0025
    """
    if stats.within is None:
        raise ValueError("nc1 needs the scatter: collect it with ClassStatistics(scatter=True)")
    if int(has_samples(stats).sum()) < 2:
        return undefined(stats)
    return nc1_of_factor(stats, stats.within, between_classes(stats, global_mean), divide_by_classes, correction)


def nc1_of_factor(stats: Moments, within: Tensor, between: Between, divide_by_classes: bool, correction: int) -> Tensor:
    """`nc1` with the factor of the class means at hand.

    Args:
        stats: of K classes.
        within: `Σ_W`, their `stats.within`.
        between: of `between_classes(stats, …)`.
        divide_by_classes: see `nc1`.
        correction: see `nc1`.
    """
    root = _root_pinv(between)
    if root.shape[1] == 0:
        return undefined(stats)
    # reshape: torchmetrics squeezes the [1, 1] of d = 1
    trace = ((within.reshape(len(root), len(root)) @ root) * root).sum() * _pooled_correction(stats, correction)
    return trace if divide_by_classes else trace * (between.reduced.shape[0] + 1)


def _pooled_correction(stats: Moments, correction: int) -> float:
    if correction == 0:
        return 1.0
    if stats.class_weighted:
        raise ValueError("a class-weighted scatter cannot be corrected afterwards: use correction=0")
    total, classes = int(stats.counts.sum()), int(has_samples(stats).sum())
    return total / (total - correction * classes) if total > correction * classes else math.nan


def _variances(stats: Moments, correction: int) -> Tensor:
    """`[K]`, NaN where n <= correction."""
    counts = stats.counts.to(torch.float64)
    if correction == 0:
        return stats.variances
    return torch.where(counts > correction, stats.variances * counts / (counts - correction), torch.nan)


def nc1_per_class(stats: Moments, *, global_mean: GlobalMean = "class", correction: int = 0) -> Tensor:
    """Each class's variance relative to the between-class one, `tr Σ_k / tr Σ_B`; `nc1_ratio` is its mean.

    Args:
        stats: with or without scatter.
        global_mean: how classes weigh in `μ_G`.
        correction: 0 or 1, variances divide by n - correction.

    Returns:
        `[K]`, >= 0; 0 under perfect collapse; NaN for classes with at most `correction` samples, or none.

    Source:
        The traces of Papyan, Han & Donoho 2020, class by class.
    """
    return _variances(stats, correction) / _between_trace(stats, global_mean)


def _between_trace(stats: Moments, global_mean: GlobalMean) -> Tensor:
    return centred_means(stats, global_mean=global_mean).square().sum(1).mean()


def nc1_ratio(
    stats: Moments,
    *,
    weighting: Literal["class", "sample"] = "class",
    divide_by_classes: bool = False,
    global_mean: GlobalMean = "class",
    correction: int = 0,
) -> Tensor:
    """Quotient of traces, `tr Σ_W / tr Σ_B`: NC1 without the inverse, from variances alone.

    Args:
        stats: with or without scatter.
        weighting: whether classes or samples weigh the same in `Σ_W`.
        divide_by_classes: True divides by K.
        global_mean: how classes weigh in `μ_G`.
        correction: 0 or 1, class variances divide by n - correction; classes with no more samples than that are left out.

    Returns:
        Scalar >= 0; 0 under perfect collapse.

    Raises:
        ValueError: no such weighting.

    Source:
        The matrices of Papyan, Han & Donoho 2020.
    """
    kept = stats.counts > correction
    variances = _variances(stats, correction)[kept]
    if weighting == "sample":
        weights = stats.counts[kept].to(torch.float64)
        within = (variances * weights).sum() / weights.sum()
    elif weighting == "class":
        within = variances.mean()
    else:
        raise ValueError(f'weighting is "class" or "sample", got {weighting!r}')
    ratio = within / _between_trace(stats, global_mean)
    return ratio / has_samples(stats).sum() if divide_by_classes else ratio


def cdnv(stats: Moments, *, exponent: int = 2, correction: int = 0, tile: int = 1024) -> Tensor:
    r"""Class-distance normalised variance, the mean over pairs of classes of `(tr Σ_i + tr Σ_j) / (2 ‖μ_i - μ_j‖^exponent)`.

    Args:
        stats: with or without scatter.
        exponent: 2 as published; 1 divides by the distance instead of its square (then it has the unit of the features).
        correction: 0 or 1, variances divide by n - correction; classes with no more samples than that are left out.
        tile: classes per tile, memory is `O(tile²)`.

    Returns:
        Scalar >= 0; 0 under perfect collapse, infinite if two centres with spread coincide.

    Raises:
        ValueError: another exponent.

    Source:
        Galanti, György & Hutter 2021, arXiv 2112.15121.
    """
    if exponent not in (1, 2):
        raise ValueError(f"exponent is 1 or 2, got {exponent}")
    kept = stats.counts > correction
    variances, means = _variances(stats, correction)[kept], stats.means[kept]
    K = len(means)
    if K < 2:
        return undefined(stats)
    means = means - means.mean(0)
    squares = means.square().sum(1)
    total = means.new_zeros(())
    for i in range(0, K, tile):
        for j in range(i, K, tile):
            left, right = slice(i, i + tile), slice(j, j + tile)
            scale = squares[left, None] + squares[right]
            distances = torch.addmm(scale, means[left], means[right].T, alpha=-2)
            # The subtraction has lost more than six digits for close pairs: take their differences instead.
            close = distances < 1e-6 * scale
            if i == j:
                close.fill_diagonal_(False)
            for pairs in torch.split(close.nonzero(), max(1, 2**22 // means.shape[1])):
                a, b = pairs[:, 0], pairs[:, 1]
                distances[a, b] = (means[left][a] - means[right][b]).square().sum(1)
            if exponent == 1:
                distances = distances.clamp_(min=0).sqrt_()
            terms = (variances[left, None] + variances[right]).div_(distances)
            if i == j:
                total += terms.fill_diagonal_(0.0).sum() / 2
            else:
                total += terms.sum()
    return total / (K * (K - 1))
