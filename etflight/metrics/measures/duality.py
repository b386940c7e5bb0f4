"""NC3: how well class means and class vectors agree."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.measures.centring import GlobalMean, chosen_vectors, has_samples, undefined
from etflight.metrics.statistics import Moments


def class_alignment(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Each class's `cos(μ_k - μ_G, w_k - w̄)`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.

    Returns:
        `[K]` in [-1, 1]; 1 under perfect collapse; NaN for classes without samples.

    Raises:
        ValueError: class vectors of another shape than the class means.

    Source:
        Yang et al. 2022, arXiv 2203.09081.
    """
    means, vectors = chosen_vectors(stats, weight, "both", global_mean, center_means, center_weight)
    cosines = (means * vectors).sum(1) / (means.norm(dim=1) * vectors.norm(dim=1))
    result = stats.means.new_full(stats.counts.shape, math.nan, dtype=torch.float64)
    result[has_samples(stats)] = cosines
    return result


def alignment(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Mean of `class_alignment` over the classes that have samples.

    Args:
        stats: see `class_alignment`.
        weight: see `class_alignment`.
        global_mean: see `class_alignment`.
        center_means: see `class_alignment`.
        center_weight: see `class_alignment`.

    Returns:
        Scalar in [-1, 1]; 1 under perfect collapse.
    """
    return mean_and_std(
        class_alignment(stats, weight, global_mean=global_mean, center_means=center_means, center_weight=center_weight)[
            has_samples(stats)
        ]
    )[0]


def alignment_std(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Standard deviation of `class_alignment` over the classes that have samples.

    Args:
        stats: see `class_alignment`.
        weight: see `class_alignment`.
        global_mean: see `class_alignment`.
        center_means: see `class_alignment`.
        center_weight: see `class_alignment`.

    Returns:
        Scalar >= 0; 0 under perfect collapse.
    """
    return mean_and_std(
        class_alignment(stats, weight, global_mean=global_mean, center_means=center_means, center_weight=center_weight)[
            has_samples(stats)
        ]
    )[1]


def mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (by n) of values `[n]`, two scalars."""
    mean = values.mean()
    return mean, (values - mean).square().mean().sqrt()


def nc3(
    stats: Moments,
    weight: Tensor,
    *,
    squared: bool = True,
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Self-duality, `‖M/‖M‖_F - W/‖W‖_F‖²_F`.

    `alignment` is the cosine form, `structure_error` that of the product `W Mᵀ`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        squared: False takes the root, Papyan's form.
        global_mean: how classes weigh in `μ_G`.
        center_weight: subtract `w̄` first.

    Returns:
        Scalar in [0, 4] (squared); 0 under perfect collapse.

    Raises:
        ValueError: class vectors of another shape than the class means.

    Source:
        Papyan, Han & Donoho 2020, section "Self-duality"; squared in Yang et al. 2022.
    """
    means, vectors = chosen_vectors(stats, weight, "both", global_mean, True, center_weight)
    distance: Tensor = (means / means.norm() - vectors / vectors.norm()).norm()
    return distance.square() if squared else distance


def structure_error(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Literal["cross", "means", "weights"] = "cross",
    squared: bool = False,
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Distance of a normalised Gram matrix to that of the simplex, `‖G/‖G‖_F - (I - 11ᵀ/K)/sqrt(K-1)‖_F`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed unless `of="means"`.
        of: "cross" for `G = W Mᵀ` (NC3), "weights" for `W Wᵀ` and "means" for `M Mᵀ` (NC2). `[K, K]` is formed.
        squared: True squares it.
        global_mean: how classes weigh in `μ_G`.
        center_weight: subtract `w̄` first; False is the published form.

    Returns:
        Scalar in [0, 2], its square with `squared`; 0 under perfect collapse.

    Raises:
        ValueError: no such `of`, or class vectors are missing or of another shape than the class means.

    Source:
        Zhu et al. 2021, arXiv 2105.02375 (NC2 and NC3).
    """
    if of == "cross":
        means, vectors = chosen_vectors(stats, weight, "both", global_mean, True, center_weight)
    elif of in ("means", "weights"):
        [vectors] = chosen_vectors(stats, weight, of, global_mean, True, center_weight)
        means = vectors
    else:
        raise ValueError(f'of is "cross", "means" or "weights", got {of!r}')
    K = len(vectors)
    if K < 2:
        return undefined(stats)
    gram = vectors @ means.T
    target = (torch.eye(K, dtype=gram.dtype, device=gram.device) - 1 / K) / math.sqrt(K - 1)
    error: Tensor = (gram / gram.norm() - target).norm()
    return error.square() if squared else error
