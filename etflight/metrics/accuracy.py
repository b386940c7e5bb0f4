"""Accuracies, confusion, calibration and mean losses: sums over samples, added over processes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32
from etflight.utils.torchmetrics_private import ExactMetric


class SampleMean(ExactMetric):
    """The mean over samples, from the means of batches, whatever their sizes and ranks.

    Unlike a tensor given to `LightningModule.log`, it has a state that a checkpoint within an epoch can hold.

    Example:
        >>> metric = SampleMean()
        >>> metric.update(torch.tensor(1.0), 3)
        >>> metric.update(torch.tensor(5.0), 1)
        >>> metric.compute().item()
        2.0
    """

    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total", dtype=torch.double)
        self.add_sum("samples")

    def update(self, mean: Tensor, samples: int) -> None:
        """Add the mean, a scalar, of a batch of `samples` samples."""
        self.total += mean.detach().double() * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """Return the mean, a float32 scalar; NaN if nothing was seen."""
        return (self.total / self.samples).float()


MOST_CLASSES = 1000  # 8 MB; with more, the cells would outnumber the pixels of a picture


class Confusion(ExactMetric):
    """Counts of (true, predicted) pairs.

    Args:
        num_classes: K; `EvaluationMetrics` keeps the counts of at most `MOST_CLASSES`.
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = Confusion(2)
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        >>> metric.compute().tolist()
        [[1, 1], [0, 1]]
    """

    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("counts", num_classes, num_classes)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: The predicted class indices `[B]`, of any integer dtype, in [0, K), or logits or probabilities `[B, K]`; rows that
                are no numbers decide nothing and are not counted.
            target: The true class indices `[B]`, of any integer dtype, in [0, K).
        """
        num_classes = len(self.counts)
        predicted, decided = _decisions(predicted, num_classes)
        cells = _invalid_if_outside(target, num_classes) * num_classes + predicted
        cells = torch.where((predicted >= 0) & (predicted < num_classes), cells, self.counts.numel())
        self.counts.view(-1).index_add_(0, cells, decided.to(cells))

    def compute(self) -> Tensor:
        """Return the counts, int64 `[K, K]`, true classes in rows."""
        return self.counts.clone()


def _invalid_if_outside(indices: Tensor, size: int) -> Tensor:
    """The indices as int64, those outside [0, size) replaced by `size`, which `index_add_` refuses: it may count others from the end."""
    indices = indices.long()  # uint8 would be a mask, and overflow in products
    return torch.where((indices >= 0) & (indices < size), indices, size)


def _decisions(predicted: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Class indices `[B]`, of logits or probabilities `[B, K]` those of the largest, and whether that is a number, `[B]` bool."""
    if predicted.ndim == 2 and predicted.shape[1] != num_classes:
        raise UserError(
            f"logits {list(predicted.shape)} for a metric of {num_classes} classes: give [B, {num_classes}]"
        )
    if predicted.ndim != 2:
        return predicted, torch.ones_like(predicted, dtype=torch.bool)
    largest, indices = predicted.max(dim=1)
    return indices, largest.isfinite()


MANY_ABOVE = 100
FEW_BELOW = 20


def by_frequency(class_counts: Tensor) -> Tensor:
    """Sort the class labels `[K]` from the most to the fewest training images `[K]`; ties go by label, the lower one first."""
    return class_counts.argsort(descending=True, stable=True)


def shot_groups(class_counts: Tensor) -> dict[str, Tensor]:
    """Make masks `[K]` of the classes with more than 100 training images, with fewer than 20, and of the rest.

    Args:
        class_counts: The number of training images of each class, `[K]`.

    Returns:
        The masks `many`, `medium`, `few`; each class is in one of them.

    Source:
        Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World" (OLTR).
    """
    many, few = class_counts > MANY_ABOVE, class_counts < FEW_BELOW
    return {"many": many, "medium": ~(many | few), "few": few}


def has_imbalance(class_counts: Tensor) -> bool:
    """Say whether some class of the counts `[K]` has more training images than another: else there is neither head nor tail."""
    return bool((class_counts != class_counts[0]).any())


def third_groups(class_counts: Tensor) -> dict[str, Tensor]:
    """Make masks `[K]` of the K//3 classes with most training images, of the K//3 with fewest, and of those between.

    Sets whose rarest class still has tens of images, such as CIFAR-10 at ratio 100 (3, 4 and 3 classes), have no few-shot class. With
    these groups their tail is a fixed share of the classes.

    Args:
        class_counts: The number of training images of each class, `[K]`; ties go by label, as in `by_frequency`.

    Returns:
        The masks `head`, `middle`, `tail`; each class is in one of them.
    """
    place, third = by_frequency(class_counts).argsort(), len(class_counts) // 3
    head, tail = place < third, place >= len(class_counts) - third
    return {"head": head, "middle": ~(head | tail), "tail": tail}


def harmonic_mean(accuracy: Tensor) -> Tensor:
    """Harmonic mean of the accuracies `[K]`, a scalar, NaN left out: 0 as soon as one class is never right; NaN if nothing is left."""
    seen = accuracy[~accuracy.isnan()]
    return len(seen) / seen.reciprocal().sum()


def shifted_accuracy(accuracy: Tensor, class_counts: Tensor, ratio: float) -> Tensor:
    """Accuracy on test images that are long-tailed themselves, computed exactly from the class accuracies; nothing is drawn.

    Class frequencies fall exponentially by `ratio` from the class with most training images to the one with fewest, as in the `exp`
    profile of training sets, but untruncated: `p_k ∝ ratio^(-place_k / (K-1))`.

    Args:
        accuracy: The accuracy of each class, `[K]`; classes whose accuracy is NaN are left out.
        class_counts: The number of training images of each class, `[K]`; they give the order of `by_frequency`.
        ratio: The largest over the smallest frequency; above 1 the tail runs as in training (forward), below 1 against it (backward).

    Returns:
        A scalar; at ratio 1 it is the mean over classes.

    Source:
        Hong et al. 2021, "Disentangling Label Distribution for Long-tailed Visual Recognition" (LADE): its released code draws test sets
        of these frequencies, truncated, for the ratios 2, 5, 10, 25 and 50. There, some methods' decisions use these frequencies.
    """
    share = by_frequency(class_counts).argsort().double() / max(len(class_counts) - 1, 1)
    weight = torch.where(accuracy.isnan(), 0.0, ratio**-share)
    return (weight * accuracy.nan_to_num()).sum() / weight.sum()


class ClassScores(NamedTuple):
    """The scores of each class.

    Attributes:
        samples: The number of test images, `[K]` int64.
        accuracy: The share of them that is right, also called recall, `[K]` float64; NaN if there are none.
        precision: The share of right ones among the images taken for the class, `[K]` float64; NaN if there are none.
    """

    samples: Tensor
    accuracy: Tensor
    precision: Tensor


class ShotAccuracy(ExactMetric):
    """Top-1 accuracy over all samples, and over classes: mean (balanced accuracy), worst, harmonic mean, and means over groups.

    A group's accuracy is the mean of its classes' accuracies; classes of which no sample was seen are left out of everything that is
    taken over classes. The groups are `shot_groups` and, where classes differ in their number of training images, `third_groups`.

    Args:
        num_classes: The number of classes K.
        shifts: The ratios of long-tailed test frequencies, for `shifted_accuracy` forward and backward.
        class_counts: The number of training images of each class, `[K]`; see `set_class_counts`.
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = ShotAccuracy(3, class_counts=torch.tensor([500, 50, 5]))
        >>> metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 2]))
        >>> accuracies = {name: round(value.item(), 2) for name, value in metric.compute().items()}
        >>> {name: accuracies[name] for name in ("acc", "acc_macro", "acc_many", "acc_medium", "acc_few", "acc_worst")}
        {'acc': 0.5, 'acc_macro': 0.5, 'acc_many': 0.5, 'acc_medium': 1.0, 'acc_few': 0.0, 'acc_worst': 0.0}
    """

    correct: Tensor
    total: Tensor
    predicted: Tensor

    def __init__(
        self,
        num_classes: int,
        shifts: Sequence[int] = (),
        *,
        class_counts: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name in ("correct", "total", "predicted"):
            self.add_sum(name, num_classes)
        self.shifts = shifts
        self._class_counts: Tensor | None = None
        if class_counts is not None:
            self.set_class_counts(class_counts)

    def set_class_counts(self, class_counts: Tensor | Sequence[int]) -> None:
        """Set the training counts `[K]` that define the groups; without them there are no groups.

        Raises:
            UserError: There is not one count for each class.
        """
        counts = torch.as_tensor(class_counts)
        if counts.shape != self.total.shape:
            raise UserError(
                f"ShotAccuracy: class_counts is {list(counts.shape)}: give one count for each of {len(self.total)} classes"
            )
        self._class_counts = counts

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: The predicted class indices `[B]`, of any integer dtype, in [0, K), or logits or probabilities `[B, K]`; after a row
                that is no number, all accuracies are NaN.
            target: The true class indices `[B]`, of any integer dtype, in [0, K).
        """
        predicted, decided = _decisions(predicted, len(self.total))
        predicted = _invalid_if_outside(predicted, len(self.total))
        target = _invalid_if_outside(target, len(self.total))
        self.total.index_add_(0, target, torch.ones_like(target))
        self.predicted.index_add_(0, predicted, decided.long())
        self.correct.index_add_(0, target, (decided & (predicted == target)).long())

    def per_class(self) -> ClassScores:
        """Return the scores of each class over all processes; every process must call it."""
        with self.sync_context():
            return self._scores()

    def _scores(self) -> ClassScores:
        undecided = self.total.sum() > self.predicted.sum()
        right = torch.where(undecided, torch.nan, self.correct.double())
        return ClassScores(self.total.clone(), right / self.total, right / self.predicted)

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies, scalars in [0, 1].

        Returns:
            `acc`, `acc_macro`, `acc_worst`, `acc_harmonic` and, for groups that have classes, `acc_many`, `acc_medium`, `acc_few`. Where
            classes differ in their number of training images also `acc_head`, `acc_middle`, `acc_tail` and, for each of the `shifts`,
            such as 50, `acc_forward_50` and `acc_backward_50`. All are NaN if nothing was seen.
        """
        accuracy = self._scores().accuracy
        worst = accuracy.nan_to_num(torch.inf).min()
        result = {
            "acc": torch.where(accuracy.isnan().all(), torch.nan, self.correct.sum() / self.total.sum()),
            "acc_macro": accuracy.nanmean(),
            "acc_worst": torch.where(worst.isinf(), torch.nan, worst),
            "acc_harmonic": harmonic_mean(accuracy),
        }
        if self._class_counts is not None:
            counts = self._class_counts.to(accuracy.device)
            ordered = has_imbalance(self._class_counts)
            groups = shot_groups(counts) | (third_groups(counts) if ordered else {})
            for group, members in groups.items():
                if members.any():
                    result[f"acc_{group}"] = accuracy[members].nanmean()
            for ratio in self.shifts if ordered else ():
                result[f"acc_forward_{ratio}"] = shifted_accuracy(accuracy, counts, ratio)
                result[f"acc_backward_{ratio}"] = shifted_accuracy(accuracy, counts, 1 / ratio)
        return {name: value.float() for name, value in result.items()}


_COARSEST, _FINEST, _STEPS = 100.0, 0.002, 109  # a ratio of 1.105 between neighbours
_ROUNDING = 1e-6  # relative, of a sum of float32 losses


class ReliabilityBins(NamedTuple):
    """Samples by the confidence of their decision, in M bins of equal width; bin m holds (m/M, (m+1)/M].

    Attributes:
        counts: The number of samples, `[M]` int64.
        confidence: Their mean largest probability, `[M]` float64; NaN in an empty bin.
        accuracy: The share of them that is right, `[M]` float64; NaN in an empty bin.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> Tensor:
        """Expected calibration error, `Σ_m n_m/N |accuracy_m - confidence_m|`: a float64 scalar, NaN if nothing was seen."""
        gaps = (self.accuracy - self.confidence).abs()
        return torch.where(self.counts > 0, self.counts * gaps, 0.0).sum() / self.counts.sum()


class Reliability(ExactMetric):
    """The data of a reliability diagram, and the expected calibration error that sums it up.

    Args:
        bins: The number of bins M >= 1; the field's comparisons have 15.
        kwargs: Arguments of `torchmetrics.Metric`.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks".

    Example:
        >>> metric = Reliability(bins=2)
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        >>> bins = metric.compute()
        >>> bins.counts.tolist(), bins.accuracy.tolist(), round(bins.ece.item(), 4)
        ([0, 2], [nan, 0.5], 0.3808)
    """

    counts: Tensor
    correct: Tensor
    confidence: Tensor

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("counts", bins)
        self.add_sum("correct", bins)
        self.add_sum("confidence", bins, dtype=torch.double)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: The logits `[B, K]`, any float dtype.
            target: The class indices `[B]`, of any integer dtype.
        """
        confidence, predicted = at_least_float32(logits).softmax(dim=1).max(dim=1)
        inner = torch.arange(1, len(self.counts), dtype=confidence.dtype, device=confidence.device) / len(self.counts)
        bins = torch.bucketize(confidence, inner)
        bins = torch.where((target >= 0) & (target < logits.shape[1]), bins, len(self.counts))  # refused by index_add_
        self.counts.index_add_(0, bins, torch.ones_like(bins))
        self.correct.index_add_(0, bins, (predicted == target).long())
        self.confidence.index_add_(0, bins, confidence.double())

    def compute(self) -> ReliabilityBins:
        """Return the bins over all processes."""
        return ReliabilityBins(self.counts.clone(), self.confidence / self.counts, self.correct.double() / self.counts)


class TemperatureFit(ExactMetric):
    """The temperature T that minimises the negative log-likelihood of `softmax(logits / T)`.

    The likelihood is summed on a logarithmic grid of temperatures, so ranks add and no logits are kept; the minimum is refined by
    the parabola through its three lowest points. It lies at an end of the grid if, for instance, every decision is right, so that a lower T
    is always better. T is then the largest whose likelihood is at least 1/e of the best: for N right decisions their mean confidence is
    about 1 - 1/N. If no temperature is better than another, T is 1.

    Attributes:
        doubt: The reason why the T computed last cannot be trusted; None if it can.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """

    losses: Tensor
    samples: Tensor
    doubt: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("losses", _STEPS, dtype=torch.double)
        self.add_sum("samples")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: The logits `[B, K]`, any float dtype.
            target: The class indices `[B]`, of any integer dtype.
        """
        logits = at_least_float32(logits)
        shifted = logits - logits.gather(1, target.long()[:, None])
        self.losses += torch.stack([(shifted / t).logsumexp(dim=1).sum() for t in self._grid().exp()])
        self.samples += len(target)

    def compute(self) -> Tensor:
        """Return T in [0.002, 100], a float32 scalar; 1 if nothing was seen."""
        losses, lowest, images, grid = self.losses, self.losses.min(), int(self.samples), self._grid()
        self.doubt = None
        if not losses.max() - lowest > _ROUNDING * lowest:  # or they are not numbers
            self.doubt = f"all temperatures suit {images} held-out images equally well" if images else None
            return torch.ones_like(grid[0])
        if lowest in (losses[0], losses[-1]):
            all_right = lowest < math.log(2)  # a wrong decision costs more at any temperature
            why = "are all classified correctly, so a lower one always fits better"
            self.doubt = f"{images} held-out images {why if all_right else 'need one beyond the range searched'}"
            return grid[losses <= lowest + 1].max().exp()
        best = losses.argmin()
        left, middle, right = losses[best - 1], losses[best], losses[best + 1]
        offset = (0.5 * (left - right) / (left - 2 * middle + right)).nan_to_num(0.0).clamp(-1, 1)
        return (grid[best] + offset.float() * (grid[1] - grid[0])).exp()

    def _grid(self) -> Tensor:
        """The logarithms of the temperatures; not a buffer, because weight averaging would change it."""
        ends = math.log(_FINEST), math.log(_COARSEST)
        return torch.linspace(*ends, _STEPS, dtype=torch.float32, device=self.losses.device)
