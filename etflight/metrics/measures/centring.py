"""Which vectors a measure compares: class means and class vectors, centred as asked, of the classes that have samples."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.statistics import Moments

GlobalMean = Literal["class", "sample"]
Of = Literal["means", "weights", "both"]


def centred_means(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """The rows `μ_k - μ_G` of the classes that have samples.

    Args:
        stats: of K classes.
        global_mean: how classes weigh in `μ_G`.

    Returns:
        `[K', d]`, K' the number of classes with samples, in class order.
    """
    means = stats.means[has_samples(stats)].to(torch.float64)
    return means - (mean_weights(stats, global_mean)[:, None] * means).sum(0)


def has_samples(stats: Moments) -> Tensor:
    """`[K]` bool: which classes take part."""
    return stats.counts > 0


def mean_weights(stats: Moments, global_mean: GlobalMean) -> Tensor:
    """Weights of the class means in the global mean, `[K']` over the classes that have samples, of sum 1.

    Raises:
        ValueError: no such global mean.
    """
    counts = stats.counts[has_samples(stats)].to(torch.float64)
    if global_mean == "class":
        return torch.full_like(counts, 1 / max(len(counts), 1))
    if global_mean == "sample":
        return counts / counts.sum()
    raise ValueError(f'global_mean is "class" or "sample", got {global_mean!r}')


def class_vectors(stats: Moments, weight: Tensor, center_weight: bool) -> Tensor:
    """The class vectors of the classes that have samples, float64 `[K', d]`.

    Args:
        stats: of K classes.
        weight: `[K, d]`.
        center_weight: subtract their mean.

    Raises:
        ValueError: another shape than that of the class means.
    """
    if weight.shape != stats.means.shape:
        raise ValueError(
            f"class vectors must be {list(stats.means.shape)} as the class means, got {list(weight.shape)}"
        )
    vectors = weight.detach().to(stats.means)[has_samples(stats)]
    return vectors - vectors.mean(0) if center_weight else vectors


def chosen_vectors(
    stats: Moments, weight: Tensor | None, of: Of, global_mean: GlobalMean, center_means: bool, center_weight: bool
) -> list[Tensor]:
    """The means, the class vectors, or both, as `of` says: each float64 `[K', d]`.

    Args:
        stats: of K classes.
        weight: `[K, d]`, class vectors, or None where only the means are asked for.
        of: what to choose; with "both" the means come first.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` from the means.
        center_weight: subtract `w̄` from the class vectors.

    Raises:
        ValueError: no such choice, or class vectors are missing or of another shape.
    """
    if of not in ("means", "weights", "both"):
        raise ValueError(f'of is "means", "weights" or "both", got {of!r}')
    chosen = []
    if of != "weights":
        raw = stats.means[has_samples(stats)].to(torch.float64)
        chosen.append(centred_means(stats, global_mean=global_mean) if center_means else raw)
    if of != "means":
        if weight is None:
            raise ValueError(f'of="{of}" needs the class vectors: pass weight')
        chosen.append(class_vectors(stats, weight, center_weight))
    return chosen


def undefined(stats: Moments) -> Tensor:
    """A scalar NaN on the device of the statistics."""
    return stats.means.new_full((), math.nan, dtype=torch.float64)
