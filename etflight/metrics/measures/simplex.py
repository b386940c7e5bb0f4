"""NC2: how far class means, or class vectors, are from a simplex ETF."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.measures.between import Between, factorise, without_null
from etflight.metrics.measures.centring import GlobalMean, Of, chosen_vectors, undefined
from etflight.metrics.measures.cosines import off_diagonal_cosines
from etflight.metrics.statistics import Moments


def nc2_equinorm(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
    correction: int = 0,
) -> Tensor:
    """How unequal the norms are: their standard deviation divided by their mean.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed for `of="weights"` and `"both"`.
        of: class means, class vectors, or the mean of the two results.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.
        correction: 0 or 1, the standard deviation divides by K - correction.

    Returns:
        Scalar >= 0; 0 under perfect collapse.

    Raises:
        ValueError: no such `of`, or class vectors are missing or of another shape than the class means.

    Source:
        Papyan, Han & Donoho 2020, section "Equinorm".
    """
    chosen = chosen_vectors(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return undefined(stats)
    return torch.stack([_variation(vectors.norm(dim=1), correction) for vectors in chosen]).mean()


def _variation(norms: Tensor, correction: int) -> Tensor:
    return norms.std(correction=correction) / norms.mean()


def nc2_equiangularity(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    deviation: Literal["etf", "std"] = "etf",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
    tile: int = 1024,
) -> Tensor:
    """How far the pairwise angles are from those of a simplex ETF: mean of `|cos + 1/(K-1)|` over pairs.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed for `of="weights"` and `"both"`.
        of: class means, class vectors, or the mean of the two results.
        deviation: "std" gives the standard deviation of the cosines instead, Papyan's equiangularity: it does not ask for -1/(K-1).
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.
        tile: classes per tile, memory is `O(tile²)`.

    Returns:
        Scalar in [0, 1 + 1/(K-1)]; 0 under perfect collapse.

    Raises:
        ValueError: no such `of` or `deviation`, or class vectors are missing or of another shape than the class means.

    Source:
        Papyan, Han & Donoho 2020, sections "Equiangularity" (std) and "Maximal-angle equiangularity" (etf).
    """
    if deviation not in ("etf", "std"):
        raise ValueError(f'deviation is "etf" or "std", got {deviation!r}')
    chosen = chosen_vectors(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return undefined(stats)
    cosines = [off_diagonal_cosines(vectors, tile=tile) for vectors in chosen]
    return torch.stack([c.deviation if deviation == "etf" else c.std for c in cosines]).mean()


def etf_distance(stats: Moments, weight: Tensor | None = None, *, of: Of = "means", squared: bool = True) -> Tensor:
    r"""Distance of the centred class means to the nearest simplex ETF, both scaled to Frobenius norm 1.

    Squared it is `2 - 2 ‖M‖_* / (sqrt(K-1) ‖M‖_F)`, see `etflight.geometry.nearest_etf`; defined also where centres coincide and the
    nearest frame is not unique.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed for `of="weights"` and `"both"`.
        of: class means, class vectors, or the mean of the two results.
        squared: False takes the root.

    Returns:
        Scalar in [0, 2) (squared); 0 under perfect collapse; NaN for K > d + 1, where no simplex ETF exists, or if all
        centres coincide.

    Raises:
        ValueError: no such `of`, or class vectors are missing or of another shape than the class means.

    Source:
        An orthogonal Procrustes problem (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem").
    """
    results = []
    for raw in chosen_vectors(stats, weight, of, "class", False, False):
        if len(raw) < 2:
            return undefined(stats)
        rows = without_null(raw - raw.mean(0), torch.ones_like(raw[:, 0]))
        results.append(etf_distance_of_factor(factorise(rows, raw.norm())))
    distance = torch.stack(results).mean()
    return distance if squared else distance.sqrt()


def etf_distance_of_factor(between: Between) -> Tensor:
    """`etf_distance`, squared, of means that are factorised already and were centred without weights."""
    rows, d = between.reduced.shape
    if rows > d:
        return between.singular.new_full((), math.nan)
    score = between.singular.sum() / (math.sqrt(rows) * between.singular.norm())
    distance: Tensor = (2 - 2 * score).clamp(min=0)
    return distance
