"""Heads that follow from class statistics, in one formula each: nearest class mean, LDA, ridge, the nearest simplex."""

import torch
from torch import Tensor

from etflight.closed_form.transform import plain, present_counts, shrunk
from etflight.embedder import FeatureMap
from etflight.geometry import nearest_etf
from etflight.heads import FittedHead
from etflight.metrics import Moments
from etflight.utils.errors import UserError
from etflight.utils.precision import in_float64


def fitted_head(
    embedder: FeatureMap, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, frozen: bool = False
) -> FittedHead:
    """Put a computed map, class vectors and biases together as a head, in the precision that they have.

    Args:
        embedder: The map of features `[B, d]`.
        weight: The class vectors `[K, d]`.
        bias: The biases `[K]`, or None.
        scale: The factor of the products, > 0.
        frozen: Whether class vectors and biases are fixed, as those of a frame.
    """
    head = FittedHead(
        weight.shape[1],
        len(weight),
        has_matrix=embedder.matrix is not None,
        unit_features=embedder.unit_features,
        normalize=embedder.normalize,
        use_bias=bias is not None,
        scale=scale,
        frozen=frozen,
    ).to(weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None and head.bias is not None:
            head.bias.copy_(bias)
    head.embedder = embedder
    return head


def nearest_class_mean(moments: Moments, embedder: FeatureMap, *, scale: float = 1.0) -> FittedHead:
    """Compute the head of the nearest class mean: the nearest by angle if the map normalises its embeddings, else by Euclidean distance.

    By angle the logits are cosines times `scale`, with the means mapped as one feature is; by distance they are
    `scale · (<μ_k, h> - ‖μ_k‖²/2)`, the same as `-scale/2 ‖h - μ_k‖²` but for a number that all classes share.

    Args:
        moments: The statistics of what the map maps: of unit features if it makes them, else of the features.
        embedder: The map, such as `whitening` makes it.
        scale: The factor of the products, > 0.

    Raises:
        UserError: A class has no samples.
    """
    means = _mapped_means(moments, embedder)
    if embedder.normalize:
        return fitted_head(embedder, means, scale=scale)
    return fitted_head(embedder, means, -scale / 2 * means.square().sum(dim=1), scale=scale)


def nearest_frame(moments: Moments, embedder: FeatureMap, *, scale: float = 1.0) -> FittedHead:
    """Compute the head whose class vectors are the simplex ETF nearest to the mapped class means; the frame is fixed.

    Args:
        moments: The statistics of what the map maps: of unit features if it makes them, else of the features.
        embedder: The map, such as `whitening` makes it.
        scale: The factor of the products, > 0.

    Raises:
        UserError: A class has no samples, or the nearest frame does not exist or is not unique: see `etflight.nearest_etf`.
    """
    frame, _ = nearest_etf(_mapped_means(moments, embedder))
    return fitted_head(embedder, frame, scale=scale, frozen=True)


def lda(moments: Moments, shrinkage: float, prior: Tensor | None = None, *, unit_features: bool = False) -> FittedHead:
    """Compute linear discriminant analysis: logits `<Σ_s⁻¹ μ_k, h> - μ_kᵀ Σ_s⁻¹ μ_k / 2 + log π_k`, up to what all classes share.

    Args:
        moments: The statistics of the features; of unit features with `unit_features`.
        shrinkage: The γ of `etflight.closed_form.shrunk`.
        prior: The class probabilities `[K]`; None gives every class the same. As it is an additive term, it changes nothing else.
        unit_features: Whether features are scaled to norm 1 first.

    Raises:
        UserError: A class has no samples, the shrinkage is outside [0, 1], or a prior is not positive.
        ValueError: The scatter was not collected.

    Source:
        Hastie, Tibshirani & Friedman, "The Elements of Statistical Learning", 2nd edition, equation 4.10; scikit-learn's
        `LinearDiscriminantAnalysis(solver="lsqr")`, whose class vectors and biases these are, but for the origin.
    """
    means = _all_means(moments)
    embedder = plain(means.shape[1], unit_features=unit_features)
    embedder.shift = means.mean(dim=0)
    centred = means - embedder.shift
    weight = torch.linalg.lstsq(shrunk(moments.covariance(), shrinkage), centred.T, driver="gelsd").solution.T
    bias = -(weight * centred).sum(dim=1) / 2
    if prior is not None:
        if prior.shape != bias.shape or not bool((prior > 0).all()):
            raise UserError(f"prior of {len(means)} classes: give a positive number for each")
        bias = bias + (in_float64(prior) / prior.sum()).log()
    return fitted_head(embedder, weight, bias)


def ridge(moments: Moments, penalty: float, *, unit_features: bool = False) -> FittedHead:
    """Compute ridge regression to one-hot targets, with free biases; to the vertices of a simplex it decides the same.

    It minimises `Σ_i w_i ‖e_y - W h_i - b‖² / Σ_i w_i + penalty ‖W‖²`, where a sample weighs 1, or with class-weighted statistics
    `w_i = 1/n_y`: every class weighs the same.

    Args:
        moments: The statistics of the features, class-weighted or not; of unit features with `unit_features`.
        penalty: λ > 0. scikit-learn's `Ridge(alpha)` has `alpha = λ Σ_i w_i`.
        unit_features: Whether features are scaled to norm 1 first.

    Raises:
        UserError: A class has no samples, or the penalty is not positive.
        ValueError: The scatter was not collected.
    """
    if not penalty > 0:
        raise UserError(f"the penalty of ridge regression is {penalty}: give a positive number")
    means = _all_means(moments)
    share = torch.ones_like(means[:, 0]) if moments.class_weighted else moments.counts.to(means)
    share = share / share.sum()
    embedder = plain(means.shape[1], unit_features=unit_features)
    embedder.shift = share @ means
    cross = share[:, None] * (means - embedder.shift)  # of centred targets and features, [K, d]
    scatter = moments.covariance() + cross.T @ (means - embedder.shift)
    scatter.diagonal().add_(penalty)
    weight = torch.linalg.solve(scatter, cross.T).T
    return fitted_head(embedder, weight, share)


def behind_frame(weight: Tensor, frame: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the linear map A before a fixed frame with which its logits are those of a linear head, up to a number all classes share.

    `A = Vᵀ W / (s κ)` with `κ = K/(K-1)` gives `s V A = W - (1/K) 11ᵀ W`. So a frame behind a learnt linear map is a learnt linear
    head, and cross-entropy with `(λ/2) ‖A‖²` is logistic regression with the penalty `λ / (s² κ)`.

    Args:
        weight: The class vectors W `[K, d]` of the linear head. For biases, give `bias[:, None]` as a second such matrix.
        frame: The simplex ETF V `[K, d']`, unit rows.
        scale: The frame's scale s.

    Returns:
        A `[d', d]`, in the dtype of `weight`.
    """
    K = len(frame)
    return (in_float64(frame).T @ in_float64(weight) * (K - 1) / (K * scale)).to(weight)


def _mapped_means(moments: Moments, embedder: FeatureMap) -> Tensor:
    """The class means `[K, d]`, mapped as one feature is; they are means of unit features already where the map makes those."""
    return embedder.mapped(_all_means(moments))


def _all_means(moments: Moments) -> Tensor:
    missing = (present_counts(moments) == 0).nonzero().flatten().tolist()
    if missing:
        raise UserError(
            f"{len(missing)} classes have no sample, the first is class {missing[0]}: leave them out, or give images"
        )
    return moments.means
