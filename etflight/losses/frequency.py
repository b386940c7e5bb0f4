"""Losses that use the class frequencies of the training images: margins, shifts, smoothings and priors."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from etflight.losses.base import Loss, below_one, not_negative, option, positive
from etflight.losses.terms import at_target, counts_with_rarest_for_none, cross_entropies, log_prior
from etflight.utils.errors import UserError

SmoothingShape = Literal["concave", "linear", "convex"]


@dataclass(eq=False, kw_only=True, repr=False)
class LDAMLoss(Loss):
    """Label-distribution-aware margin: cross-entropy after a margin, larger for rarer classes, is subtracted from the target's cosine.

    With logits `z_k = s cos_k` and margins `Δ_k = max_margin (n_min / n_k)^(1/4)`: `L_y = log(1 + Σ_{k≠y} exp(z_k - (z_y - s Δ_y)))`; for
    probabilities `Σ_k t_k L_k`, a mixup pair's `λ L(y_a) + (1-λ) L(y_b)`. `max_margin = 0` is cross-entropy. A class without training
    images counts as the rarest that has some. With `renormalize` and `DeferredBalance` this is LDAM-DRW.

    Args:
        max_margin: The margin Δ of the rarest class, a difference of cosines, in [0, 2].
        scale: The scale s > 0 of the head, by which the logits are already multiplied.

    Source:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, arXiv 1906.07413,
        equations 11 to 13. (In its released code the loss multiplies bare cosines by s.)
    """

    max_margin: float = option(0.5, lambda margin: 0 <= margin <= 2, "must lie in [0, 2]")
    scale: float = positive(30.0)

    def check_head(self, head: Any) -> None:
        """Refuse a head whose logits are not `scale` times a cosine.

        Raises:
            UserError: The head does not give cosines, learns its scale, or has another one.
        """
        name = type(head).__name__
        if head.learn_scale or not head.gives_cosines:
            raise UserError(
                f"LDAMLoss needs cosines times a fixed scale, which {name} does not give: "
                f"use CosineHead or ETFHead with scale {self.scale:g}"
            )
        if head.scale != self.scale:
            raise UserError(f"LDAMLoss has scale {self.scale}, but {name} has {head.scale}: set one to the other")

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the margin losses `[B]`."""
        excess = _log_sum_exp_of_others(logits) - logits
        if self.training:
            excess = excess + self.scale * self._margins(logits)
        return at_target(F.softplus(excess), target)

    def _margins(self, logits: Tensor) -> Tensor:
        counts = counts_with_rarest_for_none(self._counts_like(logits))
        return self.max_margin * (counts.min() / counts) ** 0.25


@dataclass(eq=False, kw_only=True, repr=False)
class _PriorLoss(Loss):
    """A loss that adds τ times a logarithm of the class frequencies to the logits.

    Args:
        tau: The strength τ >= 0.
    """

    tau: float = not_negative(1.0)

    def frequency_correction(self) -> str | None:
        """The shift of the logits, unless τ is 0."""
        return f"{type(self).__name__} (tau {self.tau:g})" if self.tau > 0 else None


@dataclass(eq=False, kw_only=True, repr=False)
class LogitAdjustedLoss(_PriorLoss):
    """Cross-entropy of logits that are shifted by class frequencies, so that the bare logits decide as if classes were balanced.

    `L = CE(z + τ log π, t)` with `π_k = n_k / N`. τ = 1 is *balanced softmax* (Ren et al., NeurIPS 2020, arXiv 2007.10740), τ = 0
    cross-entropy. The shift is the same for every target, so probabilities need no rule of their own. A class without training images
    counts as the rarest that has some. With a sampler that draws class k in proportion to `n_k^q`, τ = q adjusts for what is drawn.
    `Classifier(logit_adjustment=τ)` adjusts a model afterwards instead, whatever its loss.

    Args:
        tau: The strength τ >= 0 of the adjustment.

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314, equation 10.
    """

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropies `[B]` of adjusted logits."""
        if self.training:
            logits = logits + self.tau * log_prior(self._counts_like(logits))
        return cross_entropies(logits, target)


@dataclass(eq=False, kw_only=True, repr=False)
class LabelAwareSmoothingLoss(Loss):
    """Cross-entropy with more label smoothing for the frequent classes, which are the over-confident ones.

    `L_y = -[(1-ε_y) log p_y + ε_y/K Σ_j log p_j]`; for probabilities `Σ_k t_k L_k`. `ε_y = ε_tail + (ε_head - ε_tail) g(f_y)` with
    `f_y = (n_y - n_min)/(n_max - n_min)` and g one of `sin(πf/2)` ("concave"), `f` ("linear"), `1 - cos(πf/2)` ("convex"). If all counts
    are equal, every class has ε_tail; a class without training images counts as the rarest that has some.

    Args:
        head_smoothing: The ε of the most frequent class, in [0, 1); at ratio 100 the authors take 0.3 for CIFAR-10-LT and
            0.4 for CIFAR-100-LT.
        tail_smoothing: The ε of the rarest class, from 0 to `head_smoothing`; the authors take 0 and 0.1.
        shape: The curve by which ε rises with the count.

    Source:
        Zhong et al., "Improving Calibration for Long-Tailed Recognition" (MiSLAS), CVPR 2021, arXiv 2104.00466, section 3.2. The
        smoothed part goes to all K classes, as in its released code and in `CrossEntropyLoss`; in the paper the other classes get ε/(K-1).
    """

    head_smoothing: float = below_one(0.3)
    tail_smoothing: float = 0.0
    shape: SmoothingShape = "concave"

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = get_args(SmoothingShape)
        self._check("shape", self.shape in shapes, f"must be one of {', '.join(shapes)}")
        self._check(
            "tail_smoothing", 0 <= self.tail_smoothing <= self.head_smoothing, "must lie in [0, head_smoothing]"
        )

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the smoothed cross-entropies `[B]`."""
        log_p = logits.log_softmax(dim=1)
        if not self.training:
            return -at_target(log_p, target)
        smoothing = self._smoothing(logits)
        return -at_target((1 - smoothing) * log_p + smoothing * log_p.mean(dim=1, keepdim=True), target)

    def _smoothing(self, logits: Tensor) -> Tensor:
        counts = counts_with_rarest_for_none(self._counts_like(logits))
        fraction = (counts - counts.min()) / (counts.max() - counts.min()).clamp(min=1e-12)
        match self.shape:
            case "concave":
                rise = (math.pi / 2 * fraction).sin()
            case "linear":
                rise = fraction
            case "convex":
                rise = 1 - (math.pi / 2 * fraction).cos()
        return self.tail_smoothing + (self.head_smoothing - self.tail_smoothing) * rise


@dataclass(eq=False, kw_only=True, repr=False)
class BinaryCrossEntropyLoss(_PriorLoss):
    """A yes or no for each class instead of one choice among all, so that no class is weighed against another.

    `L_y = softplus(-x_y) + Σ_{k≠y} softplus(x_k)` with `x_k = z_k + b_k`; for probabilities
    `Σ_k [t_k softplus(-x_k) + (1-t_k) softplus(x_k)]`. The bias is the prior's log-odds: in training `b_k = τ log(π_k / (1-π_k))` of the
    training counts, where a class without images counts as the rarest that has some; in eval mode that of equal classes, `-τ log(K-1)`.

    Args:
        tau: The strength τ >= 0 of the prior; with 0 there is no bias, and no counts are needed.

    Source:
        Fan et al., AAAI 2026, arXiv 2511.14097 (BCE3S), the first of its three terms; the third spreads class vectors, which a simplex
        has spread already. The bias: Menon et al., ICLR 2021, arXiv 2007.07314, for a sigmoid.
    """

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the sums `[B]` over classes."""
        x = logits + self._bias(logits)
        if not target.is_floating_point():
            own = target[:, None]
            return -F.logsigmoid((-x).scatter(1, own, x.gather(1, own))).sum(dim=1)
        rest = target.sum(dim=1, keepdim=True) - target
        return -(target * F.logsigmoid(x) + rest * F.logsigmoid(-x)).sum(dim=1)

    def _bias(self, logits: Tensor) -> Tensor | float:
        if self.tau == 0:
            return 0.0
        counts = self._counts_like(logits) if self.training else torch.ones_like(logits[0])
        counts = counts_with_rarest_for_none(counts)
        return self.tau * (counts / (counts.sum() - counts)).log()


def _log_sum_exp_of_others(logits: Tensor) -> Tensor:
    """`log Σ_{j≠k} exp z_j` for every k, `[B, K]`; the largest is summed separately, because its 1 - p would lose all digits."""
    top = logits.argmax(dim=1, keepdim=True)
    p_of_rest = logits.softmax(dim=1).scatter(1, top, 0.0)
    without_top = logits.scatter(1, top, torch.finfo(logits.dtype).min).logsumexp(dim=1, keepdim=True)
    return (logits.logsumexp(dim=1, keepdim=True) + (-p_of_rest).log1p()).scatter(1, top, without_top)
