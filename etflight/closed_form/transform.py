"""Maps of features that follow from class statistics: standardisation and whitening."""

import torch
from torch import Tensor

from etflight.embedder import FeatureMap
from etflight.metrics import Moments
from etflight.utils.errors import UserError


def plain(dim: int, *, unit_features: bool = True, normalize: bool = False) -> FeatureMap:
    """Make the map that leaves features `[B, dim]` as they are, but for their norms, in float64."""
    return FeatureMap(dim, has_matrix=False, unit_features=unit_features, normalize=normalize).double()


def standardization(moments: Moments, *, unit_features: bool = False, normalize: bool = False) -> FeatureMap:
    """Make the map that gives each feature mean 0 and variance 1 over the samples, in float64.

    Args:
        moments: The statistics of the features, not class-weighted; of unit features with `unit_features`.
        unit_features: Whether features are scaled to norm 1 first.
        normalize: Whether embeddings are scaled to norm 1.

    Raises:
        ValueError: The scatter was not collected.
    """
    share = present_counts(moments).double() / moments.counts.sum()
    means = moments.means.nan_to_num()
    mean = share @ means
    variance = moments.covariance().diagonal() + share @ (means - mean).square()
    return _filled(mean, torch.diag(_inverse_root(variance)), unit_features, normalize)


def whitening(moments: Moments, shrinkage: float, *, unit_features: bool = True, normalize: bool = True) -> FeatureMap:
    """Make the map `Σ_s^(-1/2) (h - m)`, in float64: m is the mean of the class means, Σ_s the shrunk within-class covariance.

    Args:
        moments: The statistics of the features; of unit features with `unit_features`.
        shrinkage: The γ of `shrunk`, in [0, 1].
        unit_features: Whether features are scaled to norm 1 first.
        normalize: Whether embeddings are scaled to norm 1.

    Raises:
        UserError: The shrinkage is outside [0, 1].
        ValueError: The scatter was not collected.
    """
    values, vectors = torch.linalg.eigh(shrunk(moments.covariance(), shrinkage))
    matrix = (vectors * _inverse_root(values)) @ vectors.T
    mean = moments.means[moments.counts > 0].mean(dim=0)
    return _filled(mean, matrix, unit_features, normalize)


def shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """Compute `(1 - γ) Σ + γ (tr Σ / d) I`, `[d, d]`, the shrinkage of Ledoit & Wolf towards a multiple of the identity.

    Raises:
        UserError: γ is outside [0, 1].
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(
            f"shrinkage is {shrinkage}: give a number from 0, the covariance itself, to 1, its mean variance alone"
        )
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * identity


def present_counts(moments: Moments) -> Tensor:
    """The counts `[K]` of statistics of samples.

    Raises:
        UserError: There are no samples.
    """
    if not bool(moments.counts.any()):
        raise UserError("the class statistics are of no samples: update them with features first")
    return moments.counts


def _inverse_root(variances: Tensor) -> Tensor:
    """`1/√v` of variances `[d]`; 0 where there is none, so that a constant feature decides nothing."""
    smallest = variances.amax() * len(variances) * torch.finfo(variances.dtype).eps
    return torch.where(variances > smallest, variances.clamp(min=smallest).rsqrt(), 0.0)


def _filled(shift: Tensor, matrix: Tensor, unit_features: bool, normalize: bool) -> FeatureMap:
    made = FeatureMap(len(shift), has_matrix=True, unit_features=unit_features, normalize=normalize)
    made.shift, made.matrix = shift, matrix
    return made
