"""NC2: how far class means, or class vectors, are from a simplex ETF."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etflight.metrics.measures.vectors import (
    Decomposition,
    GlobalMean,
    Of,
    centred_means,
    class_vectors,
    compared_rows,
    decompose,
    std_of,
    tiles_of_pairs,
    undefined,
)
from etflight.metrics.statistics import Moments


class CosineStatistics(NamedTuple):
    """What is known of the cosines of pairs of classes: scalars.

    Attributes:
        mean: Their mean.
        std: Their standard deviation.
        deviation: The mean of their distance to -1/(K - 1).
    """

    mean: Tensor
    std: Tensor
    deviation: Tensor


def cosine_statistics(left: Tensor, right: Tensor | None = None) -> CosineStatistics:
    """Statistics of `cos(left_i, right_j)` over `i != j`, for `[K, d]` each; `right` is `left` by default. Memory is that of a tile."""
    K, symmetric = len(left), right is None
    if K < 2:
        nan = left.new_full((), math.nan)
        return CosineStatistics(nan, nan, nan)
    left = left / left.norm(dim=1, keepdim=True)
    right = left if right is None else right / right.norm(dim=1, keepdim=True)
    number = 0
    mean, squares, absolute = left.new_zeros(3).unbind()
    for rows, columns in tiles_of_pairs(K, symmetric=symmetric):
        shifted = left[rows] @ right[columns].T + 1 / (K - 1)
        if rows == columns:
            n = len(shifted)
            shifted = shifted.flatten()[1:].view(n - 1, n + 1)[:, :-1]  # all but the diagonal
        if shifted.numel() == 0:
            continue
        twice = 2 if symmetric and rows != columns else 1
        # Chan, Golub & LeVeque's merge of means and squared deviations
        n, tile_mean = twice * shifted.numel(), shifted.mean()
        step = tile_mean - mean
        spread = twice * (shifted - tile_mean).square_().sum()
        squares = squares + spread + step.square() * (number * n / (number + n))
        mean = mean + step * (n / (number + n))
        absolute = absolute + twice * shifted.abs().sum()
        number += n
    return CosineStatistics(mean - 1 / (K - 1), (squares / number).sqrt(), absolute / number)


def nc2_equinorm(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """How unequal the norms are: their standard deviation divided by their mean.

    Scalar >= 0; 0 under perfect collapse. From Papyan, Han & Donoho 2020, section "Equinorm".
    """
    chosen = compared_rows(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return undefined(stats)
    norms = [vectors.norm(dim=1) for vectors in chosen]
    return torch.stack([std_of(n) / n.mean() for n in norms]).mean()


def nc2_equiangularity(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    deviation: Literal["etf", "std"] = "etf",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """How far the pairwise angles are from those of a simplex ETF: mean of `|cos + 1/(K-1)|` over pairs.

    With `deviation="std"` it is the standard deviation of the cosines instead, Papyan's equiangularity, which does not depend on -1/(K-1).

    Scalar in [0, 1 + 1/(K-1)]; 0 under perfect collapse. From Papyan, Han & Donoho 2020, sections "Equiangularity" (std) and
    "Maximal-angle equiangularity" (etf).
    """
    if deviation not in ("etf", "std"):
        raise ValueError(f'deviation is "etf" or "std", got {deviation!r}')
    found = [
        cosine_statistics(rows) for rows in compared_rows(stats, weight, of, global_mean, center_means, center_weight)
    ]
    return torch.stack([c.deviation if deviation == "etf" else c.std for c in found]).mean()


def etf_distance(stats: Moments, weight: Tensor | None = None, *, of: Of = "means") -> Tensor:
    r"""Squared distance of the centred class means to the nearest simplex ETF, both scaled to Frobenius norm 1.

    It is `2 - 2 ‖M‖_* / (sqrt(K-1) ‖M‖_F)`, see `etflight.geometry.nearest_etf`; it is also defined if centres coincide and the nearest
    frame is not unique. An orthogonal Procrustes problem (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem").

    Scalar in [0, 2); 0 under perfect collapse; NaN for K > d + 1, where no simplex ETF exists, or if all centres coincide.
    """
    rows = compared_rows(stats, weight, of, center_means=False, center_weight=False)
    return torch.stack([etf_distance_of_decomposition(decompose(raw - raw.mean(0), raw)) for raw in rows]).mean()


def etf_distance_of_decomposition(factor: Decomposition) -> Tensor:
    """Compute `etf_distance` from the decomposition of centred rows."""
    singular, _, classes = factor
    if len(singular) < classes - 1:
        return singular.new_full((), math.nan)
    score = singular.sum() / (math.sqrt(len(singular)) * singular.norm())
    distance: Tensor = (2 - 2 * score).clamp(min=0)
    return distance


def cos_means(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """Mean of `cos(μ_i - μ_G, μ_j - μ_G)` over `i != j`: -1/(K-1) under perfect collapse. A curve of Yang et al. 2022."""
    return cosine_statistics(centred_means(stats, global_mean=global_mean)).mean


def cos_means_std(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """Standard deviation of the cosines that `cos_means` averages: 0 under perfect collapse."""
    return cosine_statistics(centred_means(stats, global_mean=global_mean)).std


def cos_weights(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Mean of `cos(w_i - w̄, w_j - w̄)` over `i != j`: -1/(K-1) under perfect collapse. A curve of Yang et al. 2022."""
    return cosine_statistics(class_vectors(stats, weight, center_weight)).mean


def cos_weights_std(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Standard deviation of the cosines that `cos_weights` averages: 0 under perfect collapse."""
    return cosine_statistics(class_vectors(stats, weight, center_weight)).std


def cos_cross(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Mean of `cos(μ_i - μ_G, w_j - w̄)` over `i != j`: -1/(K-1) under perfect collapse. A curve of Yang et al. 2022."""
    return cosine_statistics(*compared_rows(stats, weight, "both", global_mean, True, center_weight)).mean


def cos_cross_std(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Standard deviation of the cosines that `cos_cross` averages: 0 under perfect collapse."""
    return cosine_statistics(*compared_rows(stats, weight, "both", global_mean, True, center_weight)).std
