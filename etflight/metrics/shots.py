"""Accuracy over all samples, over classes, and over groups of classes by their number of training images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etflight.metrics.summed import SummedMetric

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
    place, third = _places(class_counts), len(class_counts) // 3
    head, tail = place < third, place >= len(class_counts) - third
    return {"head": head, "middle": ~(head | tail), "tail": tail}


def _places(class_counts: Tensor) -> Tensor:
    """Of each class in the order `by_frequency`, `[K]` from 0."""
    return by_frequency(class_counts).argsort()


def harmonic_mean(accuracy: Tensor) -> Tensor:
    """Harmonic mean of the accuracies `[K]` that are numbers, a scalar: 0 as soon as one class is never right, NaN of none."""
    seen = accuracy[~accuracy.isnan()]
    return len(seen) / seen.reciprocal().sum()


def shifted_accuracy(accuracy: Tensor, class_counts: Tensor, ratio: float) -> Tensor:
    """Accuracy on test images that are long-tailed themselves: exact, from class accuracies, nothing is drawn.

    Class frequencies fall exponentially by `ratio` from the class with most training images to the one with fewest, as the `exp`
    profile of training sets does, untruncated: `p_k ∝ ratio^(-place_k / (K-1))`.

    Args:
        accuracy: `[K]`; classes whose accuracy is NaN are left out.
        class_counts: `[K]`, training images, whose order is that of `by_frequency`.
        ratio: largest over smallest frequency; above 1 the tail runs as in training (forward), below 1 against it (backward).

    Returns:
        Scalar; the mean over classes at ratio 1.

    Source:
        Hong et al. 2021, "Disentangling Label Distribution for Long-tailed Visual Recognition" (LADE): its released code draws test sets
        of these frequencies, truncated, for the ratios 2, 5, 10, 25 and 50, and tells some methods' decisions of them, which this does not.
    """
    share = _places(class_counts).double() / max(len(class_counts) - 1, 1)
    weight = torch.where(accuracy.isnan(), 0.0, ratio**-share)
    return (weight * accuracy.nan_to_num()).sum() / weight.sum()


class ClassScores(NamedTuple):
    """What was counted of each class.

    Attributes:
        samples: `[K]` int64, test images.
        accuracy: `[K]` float64, the share of them that is right, also called recall; NaN without any.
        precision: `[K]` float64, the share of right ones among the images taken for the class; NaN if none was.
    """

    samples: Tensor
    accuracy: Tensor
    precision: Tensor


class ShotAccuracy(SummedMetric):
    """Top-1 accuracy: overall, and of classes: their mean (balanced accuracy), worst, harmonic mean, and means over groups.

    A group's accuracy is the mean of its classes' accuracies; classes without a sample seen are left out of whatever is
    taken over classes. The groups are `shot_groups` and `third_groups`.

    Args:
        num_classes: K.
        shifts: ratios of long-tailed test frequencies, for `shifted_accuracy` forward and backward.

    Example:
        >>> metric = ShotAccuracy(3)
        >>> metric.set_class_counts(torch.tensor([500, 50, 5]))
        >>> metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 2]))
        >>> accuracies = {name: round(value.item(), 2) for name, value in metric.compute().items()}
        >>> {name: accuracies[name] for name in ("acc", "acc_macro", "acc_many", "acc_medium", "acc_few", "acc_worst")}
        {'acc': 0.5, 'acc_macro': 0.5, 'acc_many': 0.5, 'acc_medium': 1.0, 'acc_few': 0.0, 'acc_worst': 0.0}
    """

    correct: Tensor
    total: Tensor
    predicted: Tensor

    def __init__(self, num_classes: int, shifts: Sequence[int] = ()) -> None:
        super().__init__()
        for name in ("correct", "total", "predicted"):
            self.add_sum(name, num_classes)
        self.shifts = shifts
        self._class_counts: Tensor | None = None

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Give the training counts `[K]` that make the groups; without them there are none."""
        self._class_counts = class_counts

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: class indices `[B]`, int64, in [0, K).
            target: the true ones, likewise.
        """
        self.total.index_add_(0, target, torch.ones_like(target))
        self.predicted.index_add_(0, predicted, torch.ones_like(predicted))
        self.correct.index_add_(0, target, (predicted == target).long())

    def per_class(self) -> ClassScores:
        """Of what all processes have seen; each must call it."""
        with self.sync_context(should_sync=self._to_sync):
            return self._scores()

    def _scores(self) -> ClassScores:
        right = self.correct.double()
        return ClassScores(self.total.clone(), right / self.total, right / self.predicted)

    def compute(self) -> dict[str, Tensor]:
        """Scalars in [0, 1].

        Returns:
            `acc`, `acc_macro`, `acc_worst`, `acc_harmonic` and, for groups that have classes, `acc_many`, `acc_medium`, `acc_few`,
            `acc_head`, `acc_middle`, `acc_tail`; for each of the `shifts`, such as 50, `acc_forward_50` and `acc_backward_50`. All NaN when
            nothing was seen.
        """
        accuracy = self._scores().accuracy
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
            for ratio in self.shifts:
                result[f"acc_forward_{ratio}"] = shifted_accuracy(accuracy, counts, ratio)
                result[f"acc_backward_{ratio}"] = shifted_accuracy(accuracy, counts, 1 / ratio)
        return {name: value.float() for name, value in result.items()}
