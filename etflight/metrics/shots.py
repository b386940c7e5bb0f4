"""Accuracy over all samples, over classes, and over groups of classes by their number of training images."""

import torch
from torch import Tensor
from torchmetrics import Metric

MANY_ABOVE = 100
FEW_BELOW = 20


def by_frequency(class_counts: Tensor) -> Tensor:
    """Class labels `[K]` from the most to the fewest training images `[K]`; of equals, the lower label first."""
    return class_counts.argsort(descending=True, stable=True)


def shot_groups(class_counts: Tensor) -> dict[str, Tensor]:
    """Masks `[K]` of the classes with more than 100 training images, fewer than 20, and the rest.

    Args:
        class_counts: `[K]`, training images.

    Returns:
        `many`, `medium`, `few`; each class is in one of them.

    Source:
        Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World" (OLTR).
    """
    many, few = class_counts > MANY_ABOVE, class_counts < FEW_BELOW
    return {"many": many, "medium": ~(many | few), "few": few}


def third_groups(class_counts: Tensor) -> dict[str, Tensor]:
    """Masks `[K]` of the K//3 classes with most training images, the K//3 with fewest, and those between.

    Sets whose rarest class still has tens of images, as CIFAR-10 at ratio 100 (3, 4 and 3 classes), have no few-shot class: their
    tail is a fixed share of the classes.

    Args:
        class_counts: `[K]`, training images; ties go by label, as in `by_frequency`.

    Returns:
        `head`, `middle`, `tail`; each class is in one of them.
    """
    num_classes, third = len(class_counts), len(class_counts) // 3
    place = torch.empty_like(class_counts, dtype=torch.long)
    place[by_frequency(class_counts)] = torch.arange(num_classes, device=class_counts.device)
    head, tail = place < third, place >= num_classes - third
    return {"head": head, "middle": ~(head | tail), "tail": tail}


def harmonic_mean(accuracy: Tensor) -> Tensor:
    """Harmonic mean of the accuracies `[K]` that are numbers, a scalar: 0 as soon as one class is never right, NaN of none."""
    seen = accuracy[~accuracy.isnan()]
    return len(seen) / seen.reciprocal().sum()


class ShotAccuracy(Metric):
    """Top-1 accuracy: overall, and of classes: their mean (balanced accuracy), worst, harmonic mean, and means over groups.

    A group's accuracy is the mean of its classes' accuracies; classes without a sample seen are left out of whatever is
    taken over classes. The groups are `shot_groups` and `third_groups`.

    Args:
        num_classes: K.

    Example:
        >>> metric = ShotAccuracy(3)
        >>> metric.set_class_counts(torch.tensor([500, 50, 5]))
        >>> metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 2]))
        >>> accuracies = {name: round(value.item(), 2) for name, value in metric.compute().items()}
        >>> {name: accuracies[name] for name in ("acc", "acc_macro", "acc_many", "acc_medium", "acc_few", "acc_worst")}
        {'acc': 0.5, 'acc_macro': 0.5, 'acc_many': 0.5, 'acc_medium': 1.0, 'acc_few': 0.0, 'acc_worst': 0.0}
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
        """Give the training counts `[K]` that make the groups; without them there are none."""
        self._class_counts = class_counts

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add predicted and true class indices, both `[B]`."""
        self.total.index_add_(0, target, torch.ones_like(target))
        self.correct.index_add_(0, target, (predicted == target).long())

    def per_class(self) -> Tensor:
        """Accuracies `[K]`, NaN for a class without samples, of what this process has seen and synced."""
        return self.correct.double() / self.total

    def compute(self) -> dict[str, Tensor]:
        """Scalars in [0, 1].

        Returns:
            `acc`, `acc_macro`, `acc_worst`, `acc_harmonic` and, for groups that have classes, `acc_many`, `acc_medium`, `acc_few`,
            `acc_head`, `acc_middle`, `acc_tail`. All NaN when nothing was seen.
        """
        accuracy = self.per_class()
        worst = accuracy.nan_to_num(torch.inf).min()
        result = {
            "acc": self.correct.sum() / self.total.sum(),
            "acc_macro": accuracy.nanmean(),
            "acc_worst": torch.where(worst.isinf(), torch.nan, worst),
            "acc_harmonic": harmonic_mean(accuracy),
        }
        if self._class_counts is not None:
            counts = self._class_counts.to(accuracy.device)
            for group, members in (shot_groups(counts) | third_groups(counts)).items():
                if members.any():
                    result[f"acc_{group}"] = accuracy[members].nanmean()
        return {name: value.float() for name, value in result.items()}
