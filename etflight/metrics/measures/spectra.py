"""Spectra of the centred means and of `Σ_W`, and how many directions they fill."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.measures.between import between_classes
from etflight.metrics.measures.centring import GlobalMean, has_samples
from etflight.metrics.statistics import Moments


def spectrum(stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class") -> Tensor:
    """Singular values of the centred means `M`, or of `Σ_W`.

    Args:
        stats: with the scatter for `of="within"`.
        of: which matrix.
        global_mean: how classes weigh in `μ_G`.

    Returns:
        Descending, >= 0: `[min(K - 1, d)]` for the means, all equal under perfect collapse; `[d]` for `Σ_W`, all 0 then.

    Raises:
        ValueError: `of="within"` on statistics without scatter.
    """
    if of == "within":
        if stats.within is None:
            raise ValueError("the spectrum of Σ_W needs the scatter: collect it with ClassStatistics(scatter=True)")
        d = stats.means.shape[1]
        within = stats.within.reshape(d, d)
        if not bool(within.isfinite().all()):
            return within.new_full((d,), math.nan)
        eigenvalues: Tensor = torch.linalg.eigvalsh(within)
        return eigenvalues.flip(0).clamp(min=0)
    if of != "means":
        raise ValueError(f'of is "means" or "within", got {of!r}')
    if int(has_samples(stats).sum()) < 2:
        return stats.means.new_empty(0)
    return between_classes(stats, global_mean).singular


def effective_rank(
    stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class"
) -> Tensor:
    """Exponential of the entropy of the `spectrum`, normalised to sum 1.

    Args:
        stats: with the scatter for `of="within"`.
        of: the centred means, or `Σ_W`.
        global_mean: how classes weigh in `μ_G`.

    Returns:
        Scalar in [1, number of singular values]; K - 1 for the means under perfect collapse; NaN for a zero matrix.

    Source:
        Roy & Vetterli 2007, "The effective rank".
    """
    return effective_rank_of_values(spectrum(stats, of=of, global_mean=global_mean))


def effective_rank_of_values(singular: Tensor) -> Tensor:
    """`effective_rank` of singular values `[n]`, NaN of none."""
    if len(singular) == 0:
        return singular.new_full((), math.nan)
    share = singular / singular.sum()
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()
