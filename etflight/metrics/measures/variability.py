"""NC1: how much the samples of a class vary, relative to the distance between classes."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.measures.vectors import (
    Decomposition,
    GlobalMean,
    centred_means,
    decomposition_of_means,
    tiles_of_pairs,
    undefined,
)
from etflight.metrics.statistics import Moments


def nc1(
    stats: Moments, *, divide_by_classes: bool = True, global_mean: GlobalMean = "class", correction: int = 0
) -> Tensor:
    r"""Within-class variability relative to the between-class one, `tr(Σ_W Σ_B⁺)/K`.

    It is solved through the singular vectors of the centred means, never through a d×d pseudo-inverse. Directions in which centres coincide
    up to rounding are left out, as in the pseudo-inverse. Whether `Σ_W` is sample- or class-weighted was decided when it was collected
    (`ClassStatistics(class_counts=…)`); a class-weighted one cannot be corrected.

    Args:
        stats: The class statistics, with the scatter.
        divide_by_classes: False gives Papyan's trace without 1/K.
        global_mean: How classes weigh in `μ_G`.
        correction: 1 makes `Σ_W` the unbiased pooled covariance, divided by N - K.

    Returns:
        Scalar >= 0; 0 under perfect collapse, NaN if all centres coincide.

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
    return nc1_of_decomposition(stats, decomposition_of_means(stats, global_mean), divide_by_classes, correction)


def nc1_of_decomposition(stats: Moments, factor: Decomposition, divide_by_classes: bool, correction: int) -> Tensor:
    """Compute `nc1` from the decomposition of the centred means."""
    within, rank = stats.covariance(), int(factor.singular.count_nonzero())
    if rank == 0:
        return undefined(stats)
    root = factor.right[:rank].T / factor.singular[:rank]  # (MᵀM)⁺ is root rootᵀ
    trace = ((within @ root) * root).sum() * _pooled_correction(stats, factor.classes, correction)
    return trace if divide_by_classes else trace * factor.classes


def _pooled_correction(stats: Moments, classes: int, correction: int) -> float:
    if correction == 0:
        return 1.0
    if stats.class_weighted:
        raise ValueError("a class-weighted scatter cannot be corrected afterwards: use correction=0")
    total, degrees = int(stats.counts.sum()), int(stats.counts.sum()) - correction * classes
    return total / degrees if degrees > 0 else math.nan


def nc1_per_class(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """Each class's variance relative to the between-class one, `tr Σ_k / tr Σ_B`; `nc1_ratio` is its mean.

    `[K]`, >= 0; 0 under perfect collapse; NaN for classes without samples. The traces of Papyan, Han & Donoho 2020, class by class.
    """
    return stats.variances / _between_trace(stats, global_mean)


def _between_trace(stats: Moments, global_mean: GlobalMean) -> Tensor:
    rows = centred_means(stats, global_mean=global_mean)
    return rows.square().sum(1).mean() if len(rows) > 1 else undefined(stats)


def nc1_ratio(
    stats: Moments,
    *,
    weighting: Literal["class", "sample"] = "class",
    global_mean: GlobalMean = "class",
    correction: int = 0,
) -> Tensor:
    """Quotient of traces, `tr Σ_W / tr Σ_B`: NC1 without the inverse, from variances alone.

    Args:
        stats: The class statistics, with or without scatter.
        weighting: Whether classes or samples weigh the same in `Σ_W`.
        global_mean: How classes weigh in `μ_G`.
        correction: 0 or 1; class variances divide by n - correction.

    Returns:
        Scalar >= 0; 0 under perfect collapse.

    Source:
        The matrices of Papyan, Han & Donoho 2020.
    """
    kept, variances = _variances(stats, correction)
    if weighting == "sample":
        weights = stats.counts[kept].to(variances)
        within = (variances * weights).sum() / weights.sum()
    elif weighting == "class":
        within = variances.mean()
    else:
        raise ValueError(f'weighting is "class" or "sample", got {weighting!r}')
    return within / _between_trace(stats, global_mean)


def _variances(stats: Moments, correction: int) -> tuple[Tensor, Tensor]:
    """Return which classes have more samples than the correction, `[K]` bool, and the variances of these classes."""
    kept = stats.counts > correction
    counts = stats.counts[kept].to(stats.variances)
    return kept, stats.variances[kept] * (counts / (counts - correction))


def cdnv(stats: Moments, *, exponent: int = 2, correction: int = 0) -> Tensor:
    r"""Class-distance normalised variance, the mean over pairs of classes of `(tr Σ_i + tr Σ_j) / (2 ‖μ_i - μ_j‖^exponent)`.

    Args:
        stats: The class statistics, with or without scatter.
        exponent: 2 as published; 1 divides by the distance instead of its square (then it has the unit of the features).
        correction: 0 or 1; variances divide by n - correction.

    Returns:
        Scalar >= 0; 0 under perfect collapse, infinite if two centres with spread coincide.

    Source:
        Galanti, György & Hutter 2021, arXiv 2112.15121.
    """
    if exponent not in (1, 2):
        raise ValueError(f"exponent is 1 or 2, got {exponent}")
    kept, variances = _variances(stats, correction)
    means = stats.means[kept]
    K = len(means)
    if K < 2:
        return undefined(stats)
    means = means - means.mean(0)
    squares = means.square().sum(1)
    total = means.new_zeros(())
    for left, right in tiles_of_pairs(K):
        scale = squares[left, None] + squares[right]
        distances = torch.addmm(scale, means[left], means[right].T, alpha=-2)
        # For close pairs the subtraction has lost more than six digits, so their differences are taken instead.
        close = distances < 1e-6 * scale
        if left == right:
            close.fill_diagonal_(False)
        for pairs in torch.split(close.nonzero(), max(1, 2**22 // means.shape[1])):
            a, b = pairs[:, 0], pairs[:, 1]
            distances[a, b] = (means[left][a] - means[right][b]).square().sum(1)
        if exponent == 1:
            distances = distances.clamp_(min=0).sqrt_()
        terms = (variances[left, None] + variances[right]).div_(distances)
        total += terms.fill_diagonal_(0.0).sum() / 2 if left == right else terms.sum()
    return total / (K * (K - 1))
