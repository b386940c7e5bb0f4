"""The between-class covariance `Σ_B`, as a factor that is cheap to solve with and whose rank is known."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from etflight.metrics.measures.centring import GlobalMean, centred_means, has_samples, mean_weights
from etflight.metrics.statistics import Moments


class Between(NamedTuple):
    """`Σ_B = AᵀA/K` with the known null vector of the centred rows taken out, and its triangular factor.

    Attributes:
        reduced: A, `[K - 1, d]`.
        q: orthonormal columns: `AᵀA = q r rᵀ qᵀ` if K - 1 <= d, else `A = q r`.
        r: triangular.
        singular: values of A, descending, 0 where only rounding is left.
    """

    reduced: Tensor
    q: Tensor
    r: Tensor
    singular: Tensor


def between_classes(stats: Moments, global_mean: GlobalMean) -> Between:
    """Factorise the centred means of at least two classes that have samples."""
    rows = without_null(centred_means(stats, global_mean=global_mean), mean_weights(stats, global_mean))
    return factorise(rows, stats.means[has_samples(stats)].norm())


def without_null(rows: Tensor, null: Tensor) -> Tensor:
    """An orthonormal basis change of `rows` `[K, d]`, with `nullᵀ rows = 0`, that leaves K - 1 rows: a Householder reflection."""
    reflect = null / null.norm()
    reflect[0] += 1
    return (rows - torch.outer(reflect, 2 / reflect.square().sum() * (reflect @ rows)))[1:]


def factorise(reduced: Tensor, scale: Tensor) -> Between:
    """Factorise; singular values that rounding in rows of norm `scale`, before centring, can explain are set to 0."""
    wide = reduced.shape[0] <= reduced.shape[1]
    q, r = torch.linalg.qr(reduced.T if wide else reduced)
    if not bool(r.isfinite().all()):
        # a diverged network is to be shown as NaN, not to end its training with a LAPACK error
        return Between(reduced, q, r, r.new_full((len(r),), math.nan))
    singular = torch.linalg.svdvals(r)
    floor = max(reduced.shape) * torch.finfo(r.dtype).eps * torch.maximum(singular[0], scale)
    return Between(reduced, q, r, torch.where(singular > floor, singular, 0.0))
