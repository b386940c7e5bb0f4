"""The rows that measures compare: centred class means and class vectors, and their decomposition."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etflight.metrics.statistics import Moments
from etflight.utils.precision import in_float64

GlobalMean = Literal["class", "sample"]
Of = Literal["means", "weights", "both"]

_TILE = 1024  # the number of classes whose pairs are held at once


def centred_means(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """The rows `μ_k - μ_G` of the classes that have samples, in class order: `[K', d]`, K' their number."""
    present = present_classes(stats)
    means = stats.means[present]
    if global_mean == "class":
        return means - means.mean(0)
    if global_mean == "sample":
        counts = stats.counts[present].to(means)
        return means - (counts[:, None] * means).sum(0) / counts.sum()
    raise ValueError(f'global_mean is "class" or "sample", got {global_mean!r}')


def present_classes(stats: Moments) -> Tensor:
    """`[K]` bool: the classes that have samples."""
    return stats.counts > 0


def class_vectors(stats: Moments, weight: Tensor, center_weight: bool) -> Tensor:
    """The class vectors of the classes that have samples, float64 `[K', d]`."""
    if weight.shape != stats.means.shape:
        raise ValueError(
            f"class vectors must be {list(stats.means.shape)} as the class means, got {list(weight.shape)}"
        )
    vectors = in_float64(weight.detach()).to(stats.means)[present_classes(stats)]
    return vectors - vectors.mean(0) if center_weight else vectors


def compared_rows(
    stats: Moments,
    weight: Tensor | None,
    of: Of,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> list[Tensor]:
    """Return the means, the class vectors, or both in this order, each float64 `[K', d]`."""
    if of not in ("means", "weights", "both"):
        raise ValueError(f'of is "means", "weights" or "both", got {of!r}')
    chosen = []
    if of != "weights":
        chosen.append(
            centred_means(stats, global_mean=global_mean) if center_means else stats.means[present_classes(stats)]
        )
    if of != "means":
        if weight is None:
            raise ValueError(f'of="{of}" needs the class vectors: pass weight')
        chosen.append(class_vectors(stats, weight, center_weight))
    return chosen


def undefined(stats: Moments) -> Tensor:
    """Return a scalar NaN on the device of the statistics."""
    return stats.means.new_full((), math.nan)


def std_of(values: Tensor) -> Tensor:
    """The standard deviation of values `[n]`, a scalar: 0 for one value, NaN for none."""
    return (values - values.mean()).square().mean().sqrt()


def tiles_of_pairs(classes: int, *, symmetric: bool = True) -> Iterator[tuple[slice, slice]]:
    """Tiles of the matrix of all pairs of classes, row by row; those below the diagonal are left out of a symmetric one."""
    for i in range(0, classes, _TILE):
        for j in range(i if symmetric else 0, classes, _TILE):
            yield slice(i, i + _TILE), slice(j, j + _TILE)


class Decomposition(NamedTuple):
    """The singular value decomposition of K centred rows.

    Attributes:
        singular: The singular values, descending, with rounding residues set to 0, `[min(K - 1, d)]`.
        right: Their right vectors as rows, `[min(K - 1, d), d]`.
        classes: K.
    """

    singular: Tensor
    right: Tensor
    classes: int


def decomposition_of_means(stats: Moments, global_mean: GlobalMean) -> Decomposition:
    """Decompose the centred means of the classes that have samples."""
    return decompose(centred_means(stats, global_mean=global_mean), stats.means[present_classes(stats)])


def decompose(rows: Tensor, raw: Tensor) -> Decomposition:
    """Decompose centred `rows` `[K, d]`, at most K - 1 of which are independent.

    Singular values that can be explained by rounding in the `raw` rows, before centring, are set to 0.
    """
    classes, d = rows.shape
    number = max(min(classes - 1, d), 0)
    if not bool(rows.isfinite().all()):
        # a diverged network must appear as NaN, not end its training with a LAPACK error
        return Decomposition(rows.new_full((number,), math.nan), rows.new_full((number, d), math.nan), classes)
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    floor = max(rows.shape) * torch.finfo(rows.dtype).eps * raw.norm()
    return Decomposition(torch.where(singular > floor, singular, 0.0)[:number], right[:number], classes)
