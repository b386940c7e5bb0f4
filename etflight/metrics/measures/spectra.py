"""Spectra, and how many directions they fill."""

import math
from typing import Literal

import torch
from torch import Tensor

from etflight.metrics.measures.vectors import GlobalMean, decomposition_of_means
from etflight.metrics.statistics import Moments


def spectrum(stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class") -> Tensor:
    """Singular values of the centred means `M`, or of `Σ_W` with `of="within"`.

    Descending, >= 0: `[min(K - 1, d)]` for the means, all equal under perfect collapse; `[d]` for `Σ_W`, all 0 then.
    """
    if of not in ("means", "within"):
        raise ValueError(f'of is "means" or "within", got {of!r}')
    if of == "means":
        return decomposition_of_means(stats, global_mean).singular
    within = stats.covariance()
    if not bool(within.isfinite().all()):
        return within.new_full((len(within),), math.nan)
    eigenvalues: Tensor = torch.linalg.eigvalsh(within)
    return eigenvalues.flip(0).clamp(min=0)


def effective_rank(
    stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class"
) -> Tensor:
    """Exponential of the entropy of the `spectrum`, normalised to sum 1 (Roy & Vetterli 2007, "The effective rank").

    Scalar in [1, number of singular values]; K - 1 for the means under perfect collapse; NaN for a zero matrix.
    """
    return effective_rank_of_values(spectrum(stats, of=of, global_mean=global_mean))


def effective_rank_of_values(singular: Tensor) -> Tensor:
    """The `effective_rank` of singular values `[n]`; NaN if there are none."""
    if len(singular) == 0:
        return singular.new_full((), math.nan)
    share = singular / singular.sum()
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()
