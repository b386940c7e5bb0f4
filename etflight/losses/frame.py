"""Dot regression onto fixed class vectors, and the temperature of the cosines that it leaves."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from etflight.losses.base import Loss, positive
from etflight.losses.terms import at_target, count_classes
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32, in_float64
from etflight.utils.ranks import in_process_group

SURE = 0.99  # the probability of a class for an embedding that equals its class vector


def temperature_of_cosines(vectors: Tensor) -> float:
    """The temperature of the softmax of cosines at which an embedding that equals its class vector has the probability `SURE`.

    Without it the largest probability would be 0.25 at best for ten classes. With the mean cosine c of two class vectors, -1/(K-1) in a
    simplex, it is `(1 - c) / log((K-1) SURE / (1 - SURE))`.

    Args:
        vectors: The class vectors `[K, d]`, of norm 1.
    """
    vectors = in_float64(vectors)
    K = len(vectors)
    cosine = float((vectors.sum(dim=0).square().sum() - K) / (K * (K - 1)))
    return (1 - cosine) / math.log((K - 1) * SURE / (1 - SURE))


@dataclass(eq=False, kw_only=True, repr=False)
class DotRegressionLoss(Loss):
    """Dot regression: pull the embedding onto its class vector, with no push from the others.

    `L = (z_y - length)² / (2·length)` with `z_y = <w_y, h>`; for probabilities `Σ_k t_k L_k`, which for a mixup pair is
    `λ L(y_a) + (1-λ) L(y_b)`. Its gradient in h is `-(1 - cos) w_y` at matching lengths.

    Args:
        length: The value `√(E_W E_H)` > 0 to which z_y is pulled; it must equal the head's scale.

    Source:
        Yang et al. 2022, arXiv 2203.09081, section 4.
    """

    length: float = positive(1.0)

    def check_head(self, head: Any) -> None:
        """Refuse a head whose target logit cannot be `length`.

        Raises:
            UserError: The head's scale is learned or differs from `length`, or its embeddings are not normalised.
        """
        name, mend = type(head).__name__, "or use CrossEntropyLoss"
        if head.learn_scale:
            raise UserError(
                f"DotRegressionLoss needs a fixed scale, but {name} learns its own: set learn_scale to false, {mend}"
            )
        if not head.gives_cosines or head.weight.requires_grad:
            raise UserError(
                f"DotRegressionLoss needs the unit embeddings and fixed class vectors of ETFHead(normalize=True), which {name} lacks: "
                f"use that, {mend}"
            )
        if head.scale != self.length:
            raise UserError(
                f"DotRegressionLoss has length {self.length}, but {name} has scale {head.scale}: set one to the other"
            )

    def default_temperature(self, head: Any) -> float:
        """Return the temperature at which an embedding that equals its class vector has the probability `SURE`.

        Dot regression pulls each logit to `length` and has no softmax of its own; see `temperature_of_cosines`.
        """
        return self.length * temperature_of_cosines(head.class_vectors.detach())

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the squared errors `[B]`."""
        if target.is_floating_point():
            return at_target(self._squared_error(logits), target)
        return self._squared_error(at_target(logits, target))

    @property
    def takes_target_logits(self) -> bool:
        """Whether `from_target_logits` can compute it: unless a subclass has losses of its own."""
        cls = type(self)
        return cls.sample_losses is DotRegressionLoss.sample_losses and cls.forward is Loss.forward

    def from_target_logits(
        self, target_logits: Tensor, target: Tensor | None = None, num_classes: int | None = None
    ) -> Tensor:
        """Compute the same loss from `Head.target_logits`, for class indices; `Classifier` trains with it.

        Args:
            target_logits: The logits `[B]` of the targets, any float dtype.
            target: The class indices `[B]`, int64; needed only if classes are balanced.
            num_classes: The number of classes K; needed only to count a batch over several processes, unless `set_class_counts` was called.

        Returns:
            The scalar loss.

        Raises:
            UserError: Targets, K or the training counts are needed to balance classes, but missing.
        """
        losses = self._squared_error(at_least_float32(target_logits))
        if not self._is_balancing():
            return losses.mean()
        if target is None:
            raise UserError(
                f"DotRegressionLoss(class_balance={self.class_balance!r}) needs the targets beside their logits"
            )
        counts = count_classes(target, num_classes or self._num_classes(target), losses.dtype)
        return (losses * self._class_weights(counts)[target]).mean()

    def _num_classes(self, target: Tensor) -> int:
        for by_class in (self._class_counts, self._given_weights):
            if by_class is not None:
                return len(by_class)
        if in_process_group():
            raise UserError(
                "DotRegressionLoss.from_target_logits counts classes over ranks: give num_classes, or call set_class_counts before"
            )
        return int(target.max()) + 1

    def _squared_error(self, logits: Tensor) -> Tensor:
        return (logits - self.length) ** 2 / (2 * self.length)
