"""NC4: whether the head decides as the nearest class centre does."""

import torch
from torch import Tensor

from etflight.metrics.measures.centring import has_samples
from etflight.metrics.statistics import Moments


def nearest_centre(features: Tensor, stats: Moments, *, max_entries: int = 2**24) -> Tensor:
    """The class whose mean is nearest, `argmin_k ‖h - μ_k‖`, among classes that have samples.

    Args:
        features: `[B, d]`.
        stats: whose means are the centres.
        max_entries: largest number of distances held at once.

    Returns:
        `[B]` int64.

    Raises:
        ValueError: no class has samples.

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    classes = has_samples(stats).nonzero().squeeze(1)
    if len(classes) == 0:
        raise ValueError("no class has samples: there is no centre")
    origin = stats.means[classes].mean(0)
    centres = stats.means[classes] - origin
    offsets = 0.5 * centres.square().sum(1)
    nearest = []
    for part in torch.split(features.detach(), max(1, max_entries // len(classes))):
        scores = (part.to(centres) - origin) @ centres.T - offsets
        nearest.append(classes[scores.argmax(1)])
    return torch.cat(nearest)


def agreement(decision: Tensor, nearest: Tensor, *, mismatch: bool = False) -> Tensor:
    """Share of samples on which two decisions agree.

    Args:
        decision: `[B]`, class indices.
        nearest: `[B]`, those to compare with, as of `nearest_centre`.
        mismatch: True gives the share of disagreement.

    Returns:
        Scalar in [0, 1].
    """
    same = (decision == nearest.to(decision.device)).to(torch.float64).mean()
    return 1 - same if mismatch else same


def nc4(
    features: Tensor,
    stats: Moments,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    use_bias: bool = True,
    mismatch: bool = False,
) -> Tensor:
    """Agreement of the head's decision, `argmax_k ⟨w_k, h⟩ + b_k`, with the nearest class centre.

    For another head, compare its own decision: `agreement(logits.argmax(1), nearest_centre(features, stats))`.

    Args:
        features: `[B, d]`.
        stats: whose means are the centres.
        weight: `[K, d]`, class vectors.
        bias: `[K]`.
        use_bias: False ignores the bias.
        mismatch: True gives the share of disagreement, Papyan's form.

    Returns:
        Scalar in [0, 1]; 1 under perfect collapse (0 with `mismatch`).

    Raises:
        ValueError: no class has samples.

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    logits = _logits(features, weight, bias if use_bias else None)
    return agreement(logits.argmax(1), nearest_centre(features, stats), mismatch=mismatch)


def nc4_centres(stats: Moments, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Share of class means that the head, bias included, assigns to their own class: NC4 on the centres, without a sample.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        bias: `[K]`.

    Returns:
        Scalar in [0, 1]; 1 under perfect collapse.
    """
    classes = has_samples(stats).nonzero().squeeze(1)
    return agreement(_logits(stats.means[classes], weight, bias).argmax(1), classes)


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = features.detach().to(torch.float64) @ weight.detach().to(features.device, torch.float64).T
    return logits if bias is None else logits + bias.detach().to(logits)
