"""Cross-entropy, and its focal form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from etflight.losses.base import Loss, below_one, not_negative
from etflight.losses.terms import at_target, cross_entropies


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropyLoss(Loss):
    """Softmax cross-entropy, with label smoothing.

    It is `-Σ_k t_k [(1-ε) log p_k + ε/K Σ_j log p_j]`, as in `torch.nn.functional.cross_entropy`; the weight of the target's class also
    scales its smoothing term.

    Args:
        label_smoothing: The smoothing ε in [0, 1).
    """

    label_smoothing: float = below_one(0.0)

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropies `[B]`."""
        if not target.is_floating_point():
            return cross_entropies(logits, target, self.label_smoothing)
        log_p = logits.log_softmax(dim=1)
        smoothing = self.label_smoothing * log_p.mean(dim=1) * target.sum(dim=1)
        return -((1 - self.label_smoothing) * (target * log_p).sum(dim=1) + smoothing)


@dataclass(eq=False, kw_only=True, repr=False)
class FocalLoss(Loss):
    """Focal loss: cross-entropy that gives less weight to samples that are already right.

    `L = -(1 - p_y)^γ log p_y` with the softmax p; for probabilities `Σ_k t_k L_k`. γ = 0 is cross-entropy. With the class balance
    "effective" it is the class-balanced focal loss of Cui et al. 2019, with a softmax where theirs has a sigmoid for each class.

    Args:
        gamma: The exponent γ >= 0.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002, equation 4, with a softmax.
    """

    gamma: float = not_negative(2.0)

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the focal losses `[B]`."""
        log_p = logits.log_softmax(dim=1)
        # not 0, because the power's gradient is infinite there for γ < 1
        one_minus_p = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).eps)
        return -at_target(one_minus_p**self.gamma * log_p, target)
