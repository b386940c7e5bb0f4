"""NC4 and NC5: whether the head decides like the nearest class centre, and where the features of unknown images lie."""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from etflight.metrics.measures.vectors import present_classes
from etflight.metrics.statistics import Moments
from etflight.utils.precision import in_float64

_MOST_DISTANCES = 2**24  # the number of distances that are held at once


class Centres(NamedTuple):
    """The means of n classes, prepared for `nearest_centre` of many batches.

    Attributes:
        classes: The classes that have samples, `[n]` int64.
        origin: The mean of their means, `[d]`.
        means: Their means less the origin, `[n, d]`.
        offsets: Half of the squared norms of these, `[n]`.
    """

    classes: Tensor
    origin: Tensor
    means: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, stats: Moments) -> Self:
        """Prepare the means of class statistics.

        Raises:
            ValueError: No class has samples.
        """
        classes = present_classes(stats).nonzero().squeeze(1)
        if len(classes) == 0:
            raise ValueError("no class has samples: there is no centre")
        origin = stats.means[classes].mean(0)
        means = stats.means[classes] - origin
        return cls(classes, origin, means, 0.5 * means.square().sum(1))


def nearest_centre(features: Tensor, stats: Moments | Centres) -> Tensor:
    """The class whose mean is nearest, `argmin_k ‖h - μ_k‖`, among classes that have samples.

    Args:
        features: The features `[B, d]`.
        stats: The class statistics, whose means are the centres.

    Returns:
        The classes, `[B]` int64; -1 for a feature that is not finite.

    Raises:
        ValueError: No class has samples.

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    classes, origin, means, offsets = Centres.of(stats) if isinstance(stats, Moments) else stats
    nearest = []
    for part in parts_by_distances(features.detach(), len(classes)):
        scores = (in_float64(part).to(means) - origin) @ means.T - offsets
        best, index = scores.max(1)
        nearest.append(torch.where(best.isfinite(), classes[index], -1))
    return torch.cat(nearest)


def parts_by_distances(features: Tensor, others: int) -> tuple[Tensor, ...]:
    """Split rows so that the distances of each part to `others` points fit into memory."""
    return torch.split(features, max(1, _MOST_DISTANCES // others))


def agreement(decision: Tensor, nearest: Tensor) -> Tensor:
    """Share of samples on which two decisions `[B]` agree, such as a head's and `nearest_centre`'s.

    Scalar in [0, 1]; NaN if one of them is -1, which is no decision.
    """
    nearest = nearest.to(decision.device)
    agree = torch.where((decision < 0) | (nearest < 0), math.nan, (decision == nearest).float())
    return in_float64(agree).mean()


def nc4(
    features: Tensor, stats: Moments, weight: Tensor, bias: Tensor | None = None, *, mismatch: bool = False
) -> Tensor:
    """Agreement of the head's decision, `argmax_k ⟨w_k, h⟩ + b_k`, with the nearest class centre.

    For another head, compare its own decision: `agreement(logits.argmax(1), nearest_centre(features, stats))`.

    Args:
        features: The features `[B, d]`.
        stats: The class statistics, whose means are the centres.
        weight: The class vectors `[K, d]`.
        bias: The biases `[K]`, or None.
        mismatch: Whether to return the share of disagreement, Papyan's form.

    Returns:
        Scalar in [0, 1]; 1 under perfect collapse (0 with `mismatch`).

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    share = agreement(_logits(features, weight, bias).argmax(1), nearest_centre(features, stats))
    return 1 - share if mismatch else share


def nc4_centres(stats: Moments, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Share of class means that the head, bias included, assigns to their own class: NC4 on the centres, without a sample.

    Scalar in [0, 1]; 1 under perfect collapse.
    """
    classes = present_classes(stats).nonzero().squeeze(1)
    largest, decisions = _logits(stats.means[classes], weight, bias).max(1)
    return agreement(decisions, torch.where(largest.isfinite(), classes, -1))


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    features = in_float64(features.detach())
    logits = features @ in_float64(weight.detach()).to(features).T
    return logits if bias is None else logits + in_float64(bias.detach()).to(logits)


def nc5(stats: Moments, unknown_mean: Tensor) -> Tensor:
    """Mean absolute cosine of the class means and the mean feature of unknown images, `mean_k |cos(μ_k, μ_U)|`; neither is centred.

    Not in `summary`, since it needs images of classes that the model does not know. Features after a ReLU are never negative, so their
    means have positive cosines.

    Args:
        stats: The class statistics of the training features.
        unknown_mean: The mean feature `[d]` of the unknown images.

    Returns:
        Scalar in [0, 1]; 0 if all class means are orthogonal to it.

    Source:
        Ben Ammar et al., "NECO: NEural Collapse Based Out-of-distribution detection", ICLR 2024, arXiv 2310.06823.
    """
    means, mean = stats.means[present_classes(stats)], in_float64(unknown_mean.detach()).to(stats.means)
    cosines: Tensor = (means @ mean) / (means.norm(dim=1) * mean.norm())
    return cosines.abs().mean()
