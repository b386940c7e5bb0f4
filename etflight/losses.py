"""Losses on logits, with class balance as a named option of all of them."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from etflight.errors import UserError

ClassBalance = Literal["none", "batch", "global"]


class Loss(nn.Module, ABC):
    """A mean over the batch of per-sample losses, weighted by class in training if asked.

    - `"none"`: every sample counts the same.
    - `"batch"`: class y weighs `((B/U)/n_y)^exponent`, with the size B of the batch, the counts `n` (sums of probabilities when
      targets are mixed) and the number U of classes present, all taken over every rank of the step.
    - `"global"`: class y weighs `(N/(K n_y))^exponent` from the training counts given to `set_class_counts`.

    Weights are not renormalised. They act in training mode only: in eval mode the loss is unweighted and nothing is communicated.
    Exponent 1 with "batch" is what the released code of Yang et al. 2022 does; 1/2 is what scaling by √E_W gives.

    Args:
        class_balance: "none", "batch" or "global".
        exponent: of the weights, >= 0.

    Raises:
        UserError: an unknown class balance, or an exponent that is negative or not finite.
    """

    def __init__(self, *, class_balance: ClassBalance = "none", exponent: float = 1.0) -> None:
        super().__init__()
        if class_balance not in ("none", "batch", "global"):
            raise UserError(
                f'{type(self).__name__}: class_balance must be "none", "batch" or "global", got {class_balance!r}'
            )
        if not 0 <= exponent < math.inf:
            raise UserError(f"{type(self).__name__}: exponent must be finite and not negative, got {exponent}")
        self.class_balance = class_balance
        self.exponent = exponent
        self._class_counts: Tensor | None = None

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Give the training counts `[K]` that "global" balance needs; the tensor is kept, not copied."""
        self._class_counts = class_counts

    def check_head(self, head: nn.Module) -> None:
        """Raise `UserError` when this loss cannot train that head; most losses take any."""

    @abstractmethod
    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Unweighted losses `[B]`; for probabilities linear in `target`, which is what lets the base weight classes.

        Args:
            logits: `[B, K]`.
            target: class indices `[B]`, or probabilities `[B, K]`.
        """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The scalar loss of logits `[B, K]` and class indices `[B]` or probabilities `[B, K]`."""
        logits = logits.float()
        if not self._is_balancing():
            return self.sample_losses(logits, target).mean()
        if target.is_floating_point():
            return self.sample_losses(logits, target * self._class_weights(target.sum(dim=0))).mean()
        weights = self._class_weights(_count(target, logits.shape[1]))
        return (self.sample_losses(logits, target) * weights[target]).mean()

    def _is_balancing(self) -> bool:
        return self.training and self.class_balance != "none"

    def _class_weights(self, batch_counts: Tensor) -> Tensor:
        """Weights `[K]` in float32; 0 for a class without samples, which no sample can then ask for."""
        if self.class_balance == "batch":
            counts = batch_counts.float()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
            fair_share = counts.sum() / (counts > 0).sum()
        else:
            if self._class_counts is None:
                raise UserError(
                    f'{type(self).__name__}(class_balance="global") needs the training counts: '
                    "train with a data module that has class_counts, or call set_class_counts"
                )
            counts = self._class_counts.to(batch_counts.device).float()
            fair_share = counts.sum() / len(counts)
        return torch.where(counts > 0, (fair_share / counts.clamp(min=1e-12)) ** self.exponent, 0.0)

    def extra_repr(self) -> str:
        """The balance, for `print(loss)`."""
        return f"class_balance={self.class_balance!r}, exponent={self.exponent}"


class CrossEntropyLoss(Loss):
    """Softmax cross-entropy, with label smoothing.

    `-Σ_k t_k [(1-ε) log p_k + ε/K Σ_j log p_j]`, as `torch.nn.functional.cross_entropy`; class weights belong to the target's
    class and also scale its smoothing term.

    Args:
        label_smoothing: ε in [0, 1).
        class_balance: see `Loss`.
        exponent: see `Loss`.
    """

    def __init__(
        self, *, label_smoothing: float = 0.0, class_balance: ClassBalance = "none", exponent: float = 1.0
    ) -> None:
        super().__init__(class_balance=class_balance, exponent=exponent)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"CrossEntropyLoss: label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropies `[B]`."""
        if not target.is_floating_point():
            return F.cross_entropy(logits, target, reduction="none", label_smoothing=self.label_smoothing)
        log_p = logits.log_softmax(dim=1)
        smoothing = self.label_smoothing * log_p.mean(dim=1) * target.sum(dim=1)
        return -((1 - self.label_smoothing) * (target * log_p).sum(dim=1) + smoothing)


class DotRegressionLoss(Loss):
    """Dot regression: pull the embedding onto its class vector, with no push from the others.

    `L = (z_y - length)² / (2·length)` with `z_y = <w_y, h>`; for probabilities `Σ_k t_k L_k`, which for a mixup pair is
    `λ L(y_a) + (1-λ) L(y_b)`. Its gradient in h is `-(1 - cos) w_y` at matching lengths.

    Args:
        length: `√(E_W E_H)`, the value that z_y is pulled to: the head's scale. > 0.
        class_balance: see `Loss`.
        exponent: see `Loss`.

    Source:
        Yang et al. 2022, arXiv 2203.09081, section 4.
    """

    def __init__(self, *, length: float = 1.0, class_balance: ClassBalance = "none", exponent: float = 1.0) -> None:
        super().__init__(class_balance=class_balance, exponent=exponent)
        if not 0 < length < math.inf:
            raise UserError(f"DotRegressionLoss: length must be positive and finite, got {length}")
        self.length = length

    def check_head(self, head: nn.Module) -> None:
        """Refuse a head whose target logit cannot be `length`.

        Raises:
            UserError: the head's scale is learned or differs from `length`, or its embeddings are not normalised.
        """
        name, mend = type(head).__name__, "or use CrossEntropyLoss"
        if getattr(head, "learn_scale", False):
            raise UserError(
                f"DotRegressionLoss needs a fixed scale, but {name} learns its own: set learn_scale to false, {mend}"
            )
        if not getattr(head, "normalize", False):
            raise UserError(
                f"DotRegressionLoss needs the unit embeddings of ETFHead(normalize=True), which {name} lacks: use that, {mend}"
            )
        if head.scale != self.length:
            raise UserError(
                f"DotRegressionLoss has length {self.length}, but {name} has scale {head.scale}: set one to the other"
            )

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Squared errors `[B]`."""
        if target.is_floating_point():
            return (target * self._squared_error(logits)).sum(dim=1)
        return self._squared_error(logits.gather(1, target[:, None]).squeeze(1))

    def from_target_logits(
        self, target_logits: Tensor, target: Tensor | None = None, num_classes: int | None = None
    ) -> Tensor:
        """The same loss from `ETFHead.target_logits`, for class indices; `Classifier` trains with it where it can.

        Args:
            target_logits: `[B]`.
            target: class indices `[B]`, needed only when classes are balanced.
            num_classes: K, needed only to count a batch over several processes, unless `set_class_counts` was called.

        Returns:
            The scalar loss.
        """
        losses = self._squared_error(target_logits.float())
        if not self._is_balancing():
            return losses.mean()
        if target is None:
            raise UserError(
                f"DotRegressionLoss(class_balance={self.class_balance!r}) needs the targets beside their logits"
            )
        counts = _count(target, num_classes or self._num_classes(target))
        return (losses * self._class_weights(counts)[target]).mean()

    def _num_classes(self, target: Tensor) -> int:
        if self._class_counts is not None:
            return len(self._class_counts)
        if dist.is_available() and dist.is_initialized():
            raise UserError(
                "DotRegressionLoss.from_target_logits counts classes over ranks: give num_classes, or call set_class_counts before"
            )
        return int(target.max()) + 1

    def _squared_error(self, logits: Tensor) -> Tensor:
        return (logits - self.length) ** 2 / (2 * self.length)


def _count(target: Tensor, num_classes: int) -> Tensor:
    # index_add_, because bincount synchronises with the host on a GPU
    ones = torch.ones_like(target, dtype=torch.float32)
    return torch.zeros(num_classes, device=target.device).index_add_(0, target, ones)
