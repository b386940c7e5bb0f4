"""Losses in which the images of a batch compete for a class vector."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from etflight.losses.base import Loss, positive
from etflight.losses.terms import at_target, cross_entropies
from etflight.utils.ranks import max_over_ranks, sum_over_ranks


@dataclass(eq=False, kw_only=True, repr=False)
class NTCELoss(Loss):
    """NTCE: a softmax down a column of the logits, of the target's logit among those of its class over the batch.

    `L_i = -log[exp(z_iy/τ) / Σ_j exp(z_jy/τ)]` for sample i of class y, with j over the batch of all ranks: each class vector chooses among
    images, where cross-entropy lets each image choose among class vectors. For probabilities `Σ_k t_k L_ik`. In eval mode, where a batch
    is arbitrary, it is the cross-entropy of `z/τ` over classes.

    Args:
        temperature: The temperature τ > 0; with unit embeddings and class vectors `z` is a cosine.

    Source:
        Koromilas et al., "Neural Collapse by Design: Learning Class Prototypes on the Hypersphere", ICML 2026, arXiv 2605.20302.
    """

    temperature: float = positive(0.1)

    def default_temperature(self, head: Any) -> float:
        """Return τ, since the loss is that of the softmax of `z/τ`."""
        return self.temperature

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the losses `[B]`; in training every process of the step must call it."""
        z = logits / self.temperature
        if not self.training:
            return cross_entropies(z, target)
        return -at_target(_log_share_of_batch(z, self._rivals(z, target)), target)

    def _rivals(self, z: Tensor, target: Tensor) -> Tensor:
        """The scaled logits of the denominators, -inf where a sample does not belong to one."""
        return z


@dataclass(eq=False, kw_only=True, repr=False)
class NONLLoss(NTCELoss):
    """NONL: `NTCELoss` with the samples of other classes alone in the denominator, so that images of one class do not compete.

    `L_i = -log[exp(z_iy/τ) / Σ_{j: y_j ≠ y} exp(z_jy/τ)]`, with j over the batch of all ranks; it may be negative. For probabilities
    `Σ_k t_k L_ik`, where the samples whose target gives class k nothing are in its denominator. A class costs nothing if no sample of the
    batch is in its denominator.

    Args:
        temperature: The temperature τ > 0.

    Source:
        Koromilas et al., ICML 2026, arXiv 2605.20302; its released code trains with τ 0.1.
    """

    def _rivals(self, z: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return z.masked_fill(target > 0, -math.inf)
        return z.scatter(1, target[:, None], -math.inf)


def _log_share_of_batch(z: Tensor, rivals: Tensor) -> Tensor:
    """`z_ik - log Σ_j exp(rivals_jk)`, `[B, K]`, with j over the batch of all ranks; 0 for a class whose rivals are all -inf."""
    highest = max_over_ranks(rivals.amax(dim=0))
    alone = highest.isneginf()
    highest = highest.masked_fill(alone, 0.0)
    sums = sum_over_ranks((rivals - highest).exp().sum(dim=0))
    return (z - highest - sums.masked_fill(alone, 1.0).log()).masked_fill(alone, 0.0)
