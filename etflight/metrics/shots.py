"""Accuracy over all samples, over classes, and over groups of classes by their number of training images."""

import torch
from torch import Tensor
from torchmetrics import Metric

MANY_ABOVE = 100
FEW_BELOW = 20


class ShotAccuracy(Metric):
    """Top-1 accuracy: overall, mean over classes, and mean over many-, medium- and few-shot classes.

    Groups follow Liu et al. 2019 (OLTR): many has more than 100 training images, few has fewer than 20, medium the rest. A group's
    accuracy is the mean of its classes' accuracies; classes without a sample seen are left out of every mean over classes.

    Args:
        num_classes: K.

    Example:
        >>> metric = ShotAccuracy(3)
        >>> metric.set_class_counts(torch.tensor([500, 50, 5]))
        >>> metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 2]))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'acc': 0.5, 'acc_macro': 0.5, 'acc_many': 0.5, 'acc_medium': 1.0, 'acc_few': 0.0}
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self._class_counts: Tensor | None = None

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Give the training counts `[K]` that make the groups; without them only `acc` and `acc_macro` are computed."""
        self._class_counts = class_counts

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add predicted and true class indices, both `[B]`."""
        self.total.index_add_(0, target, torch.ones_like(target))
        self.correct.index_add_(0, target, (predicted == target).long())

    def per_class(self) -> Tensor:
        """Accuracies `[K]`, NaN for a class without samples, of what this process has seen and synced."""
        return self.correct.double() / self.total

    def compute(self) -> dict[str, Tensor]:
        """Scalars in [0, 1] under `acc`, `acc_macro` and, for groups that have classes, `acc_many`, `acc_medium`, `acc_few`."""
        accuracy = self.per_class()
        result = {"acc": self.correct.sum() / self.total.sum(), "acc_macro": accuracy.nanmean()}
        if self._class_counts is not None:
            counts = self._class_counts.to(accuracy.device)
            groups = {
                "acc_many": counts > MANY_ABOVE,
                "acc_medium": (counts <= MANY_ABOVE) & (counts >= FEW_BELOW),
                "acc_few": counts < FEW_BELOW,
            }
            result |= {name: accuracy[members].nanmean() for name, members in groups.items() if members.any()}
        return {name: value.float() for name, value in result.items()}
