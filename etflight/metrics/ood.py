r"""Out-of-distribution detection: post-hoc scores of a trained model's outputs, and how well a score tells known from unknown images.

A larger score always means more like the known classes; a score that its paper defines the other way round has its sign turned. Nothing
is trained: scores take logits `[N, K]`, or features `[N, d]`, which may be a backbone's pooled features or the embedding that meets the
class vectors. Scores are float64 `[N]`, on the device of their input, or on the CPU if that has no float64. Rows that hold NaN or infinity
are refused by a `UserError`, because a broken image must get no score at all; only a logit of minus infinity has a meaning.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

from etflight.metrics.measures import parts_by_distances
from etflight.metrics.statistics import Moments
from etflight.utils.errors import UserError
from etflight.utils.precision import finite_logits, in_float64, refuse_not_finite, with_float64

_FEATURES, _TRAINING, _VECTORS = "features", "training features", "class vectors"  # what errors call them

# Scores of logits ---------------------------------------------------------------------------------------------------


def msp(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Maximum softmax probability, `max_k softmax(z / T)_k`.

    Args:
        logits: The logits `[N, K]`.
        temperature: The temperature T > 0; 1 in the paper.

    Returns:
        `[N]`, in [1/K, 1].

    Source:
        Hendrycks & Gimpel 2017, arXiv 1610.02136.

    Example:
        >>> msp(torch.tensor([[0.0, 0.0], [9.0, 0.0]])).round(decimals=2).tolist()
        [0.5, 1.0]
    """
    return (finite_logits(logits) / temperature).softmax(dim=1).amax(dim=1)


def max_logit(logits: Tensor) -> Tensor:
    """The largest logit, `max_k z_k`.

    Args:
        logits: The logits `[N, K]`.

    Source:
        Hendrycks et al. 2022, arXiv 1911.11132.
    """
    return finite_logits(logits).amax(dim=1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Negative energy, `T log Σ_k exp(z_k / T)`; between `max_logit` and the same plus `T log K`.

    Args:
        logits: The logits `[N, K]`.
        temperature: The temperature T > 0; 1 in the paper.

    Source:
        Liu et al. 2020, arXiv 2010.03759.
    """
    return temperature * (finite_logits(logits) / temperature).logsumexp(dim=1)


# Scores of features -------------------------------------------------------------------------------------------------


def mahalanobis(features: Tensor, stats: Moments) -> Tensor:
    """Negative squared Mahalanobis distance to the nearest class mean, `-min_k (h - μ_k)ᵀ Σ_W⁺ (h - μ_k)`.

    Directions in which the training features of a class do not vary, up to the rounding of float32 features, are left out, as in the
    pseudo-inverse.

    Args:
        features: The features `[N, d]`.
        stats: The class statistics of the training features, with the scatter.

    Raises:
        ValueError: The statistics are without the scatter, or not finite.

    Source:
        Lee et al. 2018, arXiv 1807.03888; the score of one layer, without the changes of the input.
    """
    device = with_float64(features.device)
    means = stats.means[stats.counts > 0].to(device)
    refuse_not_finite("class means", means)
    refuse_not_finite(_FEATURES, features)
    variances, directions = torch.linalg.eigh(stats.covariance().to(device))
    scale, single = means.square().sum(1).amax(), torch.finfo(torch.float32).eps
    kept = variances > torch.maximum(scale * single**2, variances[-1] * len(variances) * torch.finfo(torch.float64).eps)
    white = directions[:, kept] / variances[kept].sqrt()
    origin = means.mean(0)  # with it the distances lose fewer digits
    centres = (means - origin) @ white
    parts = parts_by_distances(features, len(centres))
    return torch.cat([-torch.cdist((in_float64(part) - origin) @ white, centres).amin(1).square() for part in parts])


def knn(features: Tensor, train_features: Tensor, k: int = 50) -> Tensor:
    """Negative distance to the k-th nearest training feature, all scaled to norm 1; a feature of zeros counts as orthogonal to all.

    Args:
        features: The features `[N, d]`.
        train_features: The training features `[M, d]`.
        k: The neighbour, 1 to M. The paper takes 50 for CIFAR-10, 200 for CIFAR-100 and 1,000 for ImageNet.

    Returns:
        `[N]`, in [-2, 0].

    Raises:
        UserError: There is no k-th neighbour.

    Source:
        Sun et al. 2022, arXiv 2204.06507.

    Example:
        >>> knn(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]), k=3).item()
        -2.0
    """
    if not 1 <= k <= len(train_features):
        raise UserError(
            f"there is no neighbour k = {k} among {len(train_features)} training images: give 1 to that many"
        )
    refuse_not_finite(_TRAINING, train_features)
    refuse_not_finite(_FEATURES, features)
    known = F.normalize(in_float64(train_features), dim=1).T
    cosines = (
        F.normalize(in_float64(part), dim=1) @ known for part in parts_by_distances(features, len(train_features))
    )
    kth = torch.cat([part.topk(k, dim=1).values[:, -1] for part in cosines])
    distances: Tensor = (2 - 2 * kth).clamp(min=0).sqrt()
    return -distances


class Subspace(NamedTuple):
    """A subspace of r dimensions.

    Attributes:
        origin: What is subtracted from features first, `[d]` float64.
        basis: Orthonormal rows, `[r, d]` float64.
    """

    origin: Tensor
    basis: Tensor

    def share(self, features: Tensor) -> Tensor:
        """The share of each feature's norm that lies in the subspace, `‖P(h - o)‖ / ‖h - o‖`, in [0, 1]; 0 for the origin itself."""
        refuse_not_finite(_FEATURES, features)
        centred = in_float64(features) - self.origin
        share: Tensor = (centred @ self.basis.T).norm(dim=1) / centred.norm(dim=1)
        return share.nan_to_num(nan=0.0)


def principal_subspace(train_features: Tensor, components: int) -> Subspace:
    """The subspace of the leading principal components of training features, whose origin is their mean.

    Args:
        train_features: The training features `[M, d]`.
        components: The number of components r, 1 to d.

    Raises:
        UserError: There are not so many components.
    """
    width = train_features.shape[1]
    if not 1 <= components <= width:
        raise UserError(f"there are no {components} principal components of {width} features: give 1 to {width}")
    refuse_not_finite(_TRAINING, train_features)
    centred = in_float64(train_features)
    origin = centred.mean(0)
    centred = centred - origin
    _, directions = torch.linalg.eigh(centred.T @ centred)
    return Subspace(origin, directions.T.flip(0)[:components])


def neco(features: Tensor, subspace: Subspace) -> Tensor:
    """NECO: the share of a feature's norm in the principal subspace of the training features, `‖P(h - μ)‖ / ‖h - μ‖`.

    This is the paper's ratio, of features centred at the training mean as in a principal component analysis. Its released code also
    divides each feature by its standard deviation, and says that this is better left out if the classes have collapsed. That code
    multiplies the ratio by the largest logit, except for ResNets: `neco_max_logit`.

    Args:
        features: The features `[N, d]`.
        subspace: The result of `principal_subspace`; under collapse the class means fill K - 1 components.

    Returns:
        `[N]`, in [0, 1].

    Source:
        Ben Ammar et al., "NECO: NEural Collapse Based Out-of-distribution detection", ICLR 2024, arXiv 2310.06823.
    """
    return subspace.share(features)


def neco_max_logit(features: Tensor, logits: Tensor, subspace: Subspace) -> Tensor:
    """`neco` times `max_logit`, as the released code has it for networks that are no ResNets."""
    return neco(features, subspace) * max_logit(logits)


# Scores of a frame --------------------------------------------------------------------------------------------------


def span_of(weight: Tensor) -> Subspace:
    """The span of class vectors `[K, d]`: K - 1 dimensions for a simplex ETF; directions that rounding can explain are left out."""
    refuse_not_finite(_VECTORS, weight)
    _, singular, right = torch.linalg.svd(in_float64(weight.detach()), full_matrices=False)
    rounding = (
        math.sqrt(max(weight.shape)) * torch.finfo(weight.dtype).eps
    )  # errors of many numbers, which are independent
    return Subspace(right.new_zeros(weight.shape[1]), right[singular > rounding * singular[0]])


def span_norm(embedding: Tensor, weight: Tensor) -> Tensor:
    """The share of the embedding's norm in the span of the class vectors, `‖P h‖ / ‖h‖`; for an embedding of norm 1 this is `‖P h‖`.

    The class vectors are known without any training image. The score is 1 for everything if they span the whole space, as K >= d learned
    vectors or the frame of K = d + 1 classes do.

    Args:
        embedding: What the head compares with its class vectors, `[N, d]`.
        weight: The class vectors `[K, d]`.

    Returns:
        `[N]`, in [0, 1].

    Source:
        `neco`, with the span of a fixed frame in the place of principal components.

    Example:
        >>> span_norm(torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])).item()
        0.6
    """
    return span_of(weight).share(embedding)


def largest_cosine(embedding: Tensor, weight: Tensor) -> Tensor:
    """The largest cosine with a class vector, `max_k cos(h, w_k)`; for a fixed frame and normalised embeddings the order of `max_logit`.

    Args:
        embedding: What the head compares with its class vectors, `[N, d]`.
        weight: The class vectors `[K, d]`.

    Returns:
        `[N]`, in [-1, 1]; 0 for an embedding of zeros.
    """
    refuse_not_finite(_VECTORS, weight)
    refuse_not_finite(_FEATURES, embedding)
    return (F.normalize(in_float64(embedding), dim=1) @ F.normalize(in_float64(weight.detach()), dim=1).T).amax(1)


# How well a score separates -----------------------------------------------------------------------------------------


class Separation(NamedTuple):
    """How well a score separates known from unknown images; a score that guesses has an AUROC of 0.5.

    Attributes:
        auroc: Area under the ROC curve: the probability that a known image has a larger score than an unknown one, ties counting half.
        aupr_known: Average precision with the known images as positives; a score that guesses gets their share.
        aupr_unknown: Average precision with the unknown images as positives, of the negative score.
        fpr95: Share of unknown images that are taken for known at the highest threshold that keeps at least 95 % of the known ones.
    """

    auroc: float
    aupr_known: float
    aupr_unknown: float
    fpr95: float


def separation(known: Tensor, unknown: Tensor) -> Separation:
    """Compare the scores of known and of unknown images; only their order counts.

    Args:
        known: The scores of the known images, `[N]`.
        unknown: The scores of the unknown images, `[M]`.

    Raises:
        UserError: There are no scores of one kind, or a score is NaN.

    Source:
        Hendrycks & Gimpel 2017, arXiv 1610.02136 (AUROC and both AUPR); Liang et al. 2018, arXiv 1706.02690 (FPR at 95 % TPR).

    Example:
        >>> round(separation(torch.tensor([0.9, 0.8, 0.4]), torch.tensor([0.5, 0.1])).auroc, 4)
        0.8333
    """
    scores = in_float64(torch.cat([known, unknown]))
    broken = int(scores.isnan().sum())
    if broken or not (len(known) and len(unknown)):
        raise UserError(
            f"scores of {len(known)} known and {len(unknown)} unknown images, {broken} of them NaN: give numbers for both kinds"
        )
    # torchmetrics would send scores outside [0, 1] through a sigmoid, where the largest become equal
    ranks = torch.unique(scores, return_inverse=True)[1].double() / len(scores)
    is_known = (torch.arange(len(scores), device=scores.device) < len(known)).long()
    false, true, _ = binary_roc(ranks, is_known)
    return Separation(
        binary_auroc(ranks, is_known).item(),
        binary_average_precision(ranks, is_known).item(),
        binary_average_precision(1 - ranks, 1 - is_known).item(),
        false[(true >= 0.95).long().argmax()].item(),
    )
