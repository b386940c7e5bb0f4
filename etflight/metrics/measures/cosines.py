"""Cosines between different classes: of means, of class vectors, and of one with the other."""

import math
from typing import NamedTuple

from torch import Tensor

from etflight.metrics.measures.centring import GlobalMean, Of, chosen_vectors, undefined
from etflight.metrics.statistics import Moments


class Cosines(NamedTuple):
    """Of all pairs of different classes.

    Attributes:
        mean: scalar.
        std: scalar, the standard deviation.
        deviation: scalar, the mean of `|cos + 1/(K - 1)|`.
    """

    mean: Tensor
    std: Tensor
    deviation: Tensor


def off_diagonal_cosines(left: Tensor, right: Tensor | None = None, tile: int = 1024) -> Cosines:
    """Statistics of `cos(left_i, right_j)` over `i != j`, tile by tile.

    Args:
        left: `[K, d]`.
        right: `[K, d]`; `left` by default.
        tile: classes per tile, memory is `O(tile²)`.
    """
    symmetric = right is None
    left = left / left.norm(dim=1, keepdim=True)
    right = left if right is None else right / right.norm(dim=1, keepdim=True)
    K = len(left)
    number = 0
    mean, squares, absolute = left.new_zeros(3).unbind()
    for i in range(0, K, tile):
        for j in range(i if symmetric else 0, K, tile):
            shifted = left[i : i + tile] @ right[j : j + tile].T + 1 / (K - 1)
            if i == j:
                n = len(shifted)
                shifted = shifted.flatten()[1:].view(n - 1, n + 1)[:, :-1]  # all but the diagonal
            if shifted.numel() == 0:
                continue
            twice = 2 if symmetric and i != j else 1
            # Chan, Golub & LeVeque's merge of means and squared deviations
            tile_mean = shifted.mean()
            n = twice * shifted.numel()
            step = tile_mean - mean
            squares = (
                squares + twice * (shifted - tile_mean).square_().sum() + step.square() * (number * n / (number + n))
            )
            mean = mean + step * (n / (number + n))
            absolute = absolute + twice * shifted.abs().sum()
            number += n
    if number == 0:
        nan = left.new_full((), math.nan)
        return Cosines(nan, nan, nan)
    return Cosines(mean - 1 / (K - 1), (squares / number).sqrt(), absolute / number)


def cos_means(stats: Moments, *, global_mean: GlobalMean = "class", center_means: bool = True) -> Tensor:
    """Mean of `cos(μ_i - μ_G, μ_j - μ_G)` over `i != j`.

    Args:
        stats: with or without scatter.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.

    Returns:
        Scalar in [-1, 1]; -1/(K-1) under perfect collapse.

    Source:
        Yang et al. 2022, arXiv 2203.09081, whose curves show it.
    """
    return pairwise_cosines(stats, None, "means", global_mean, center_means, True).mean


def cos_means_std(stats: Moments, *, global_mean: GlobalMean = "class", center_means: bool = True) -> Tensor:
    """Standard deviation of what `cos_means` averages.

    Args:
        stats: see `cos_means`.
        global_mean: see `cos_means`.
        center_means: see `cos_means`.

    Returns:
        Scalar >= 0; 0 under perfect collapse.
    """
    return pairwise_cosines(stats, None, "means", global_mean, center_means, True).std


def cos_weights(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Mean of `cos(w_i - w̄, w_j - w̄)` over `i != j`.

    Args:
        stats: says which classes have samples; the others are left out.
        weight: `[K, d]`, class vectors.
        center_weight: subtract `w̄` first.

    Returns:
        Scalar in [-1, 1]; -1/(K-1) under perfect collapse.

    Raises:
        ValueError: class vectors of another shape than the class means.

    Source:
        Yang et al. 2022, arXiv 2203.09081.
    """
    return pairwise_cosines(stats, weight, "weights", "class", True, center_weight).mean


def cos_weights_std(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Standard deviation of what `cos_weights` averages.

    Args:
        stats: see `cos_weights`.
        weight: see `cos_weights`.
        center_weight: see `cos_weights`.

    Returns:
        Scalar >= 0; 0 under perfect collapse.
    """
    return pairwise_cosines(stats, weight, "weights", "class", True, center_weight).std


def cos_cross(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Mean of `cos(μ_i - μ_G, w_j - w̄)` over `i != j`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.

    Returns:
        Scalar in [-1, 1]; -1/(K-1) under perfect collapse.

    Raises:
        ValueError: class vectors of another shape than the class means.

    Source:
        Yang et al. 2022, arXiv 2203.09081.
    """
    return pairwise_cosines(stats, weight, "both", global_mean, center_means, center_weight).mean


def cos_cross_std(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Standard deviation of what `cos_cross` averages.

    Args:
        stats: see `cos_cross`.
        weight: see `cos_cross`.
        global_mean: see `cos_cross`.
        center_means: see `cos_cross`.
        center_weight: see `cos_cross`.

    Returns:
        Scalar >= 0; 0 under perfect collapse.
    """
    return pairwise_cosines(stats, weight, "both", global_mean, center_means, center_weight).std


def pairwise_cosines(
    stats: Moments, weight: Tensor | None, of: Of, global_mean: GlobalMean, center_means: bool, center_weight: bool
) -> Cosines:
    """Cosines between different classes of what `chosen_vectors` chooses; with `of="both"` of a mean and another's class vector.

    Args:
        stats: of K classes.
        weight: see `chosen_vectors`.
        of: see `chosen_vectors`.
        global_mean: see `chosen_vectors`.
        center_means: see `chosen_vectors`.
        center_weight: see `chosen_vectors`.

    Returns:
        All NaN where fewer than two classes have samples.
    """
    chosen = chosen_vectors(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return Cosines(undefined(stats), undefined(stats), undefined(stats))
    return off_diagonal_cosines(chosen[0], chosen[-1] if of == "both" else None)
