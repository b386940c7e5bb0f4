"""NC3: how well class means and class vectors agree."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.measures.vectors import GlobalMean, compared_rows, present_classes, std_of, undefined
from etflight.metrics.statistics import Moments


def class_alignment(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Each class's `cos(μ_k - μ_G, w_k - w̄)`, as in Yang et al. 2022, arXiv 2203.09081.

    `[K]` in [-1, 1]; 1 under perfect collapse; NaN for classes without samples.
    """
    result = stats.means.new_full(stats.counts.shape, math.nan)
    means, vectors = compared_rows(stats, weight, "both", global_mean, True, center_weight)
    result[present_classes(stats)] = (means * vectors).sum(1) / (means.norm(dim=1) * vectors.norm(dim=1))
    return result


def alignment(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Mean of `class_alignment` over the classes that have samples: 1 under perfect collapse."""
    return class_alignment(stats, weight, global_mean=global_mean, center_weight=center_weight)[
        present_classes(stats)
    ].mean()


def alignment_std(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Standard deviation of `class_alignment` over the classes that have samples: 0 under perfect collapse."""
    return std_of(
        class_alignment(stats, weight, global_mean=global_mean, center_weight=center_weight)[present_classes(stats)]
    )


def nc3(
    stats: Moments,
    weight: Tensor,
    *,
    squared: bool = True,
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Self-duality, `‖M/‖M‖_F - W/‖W‖_F‖²_F`; `squared=False` takes the root, Papyan's form.

    `alignment` is the cosine form, `structure_error` that of the product `W Mᵀ`.

    Scalar in [0, 4] (squared); 0 under perfect collapse. From Papyan, Han & Donoho 2020, section "Self-duality"; squared in
    Yang et al. 2022.
    """
    if int(present_classes(stats).sum()) < 2:
        return undefined(stats)
    means, vectors = compared_rows(stats, weight, "both", global_mean, True, center_weight)
    distance: Tensor = (means / means.norm() - vectors / vectors.norm()).norm()
    return distance.square() if squared else distance


def structure_error(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Literal["cross", "means", "weights"] = "cross",
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Distance of a normalised Gram matrix to that of the simplex, `‖G/‖G‖_F - (I - 11ᵀ/K)/sqrt(K-1)‖_F`.

    `G` `[K, K]` is `W Mᵀ` for `of="cross"` (NC3), `W Wᵀ` for "weights" and `M Mᵀ` for "means" (NC2); `center_weight=False` is the
    published form.

    Scalar in [0, 2]; 0 under perfect collapse. From Zhu et al. 2021, arXiv 2105.02375 (NC2 and NC3).
    """
    if of not in ("cross", "means", "weights"):
        raise ValueError(f'of is "cross", "means" or "weights", got {of!r}')
    chosen = compared_rows(stats, weight, "both" if of == "cross" else of, global_mean, True, center_weight)
    K = len(chosen[0])
    if K < 2:
        return undefined(stats)
    gram = chosen[-1] @ chosen[0].T
    target = (torch.eye(K).to(gram) - 1 / K) / math.sqrt(K - 1)
    error: Tensor = (gram / gram.norm() - target).norm()
    return error
