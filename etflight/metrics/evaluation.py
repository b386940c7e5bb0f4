"""What a validation or a test counts of a model's decisions and probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from etflight.metrics.accuracy import (
    MOST_CLASSES,
    ClassScores,
    Confusion,
    Reliability,
    ReliabilityBins,
    ShotAccuracy,
)


class Evaluation(NamedTuple):
    """The counts of a test.

    Attributes:
        classes: The scores of each class.
        confusion: The counts int64 `[K, K]`, true classes in rows; None above `etflight.metrics.accuracy.MOST_CLASSES` classes.
        raw: The bins of the probabilities without a temperature.
        calibrated: The bins of the probabilities with the model's temperature.
    """

    classes: ClassScores
    confusion: Tensor | None
    raw: ReliabilityBins
    calibrated: ReliabilityBins


class EvaluationMetrics(nn.Module):
    """Accuracies, calibration errors and confusions, counted over the batches of all processes.

    Args:
        num_classes: The number of classes K.
        prior_shifts: The ratios of long-tailed test sets for which an accuracy is computed, see `ShotAccuracy`.
        confusion: Whether to count confusions as well, of at most `MOST_CLASSES` classes.
    """

    def __init__(self, num_classes: int, prior_shifts: Sequence[int] = (), *, confusion: bool = False) -> None:
        super().__init__()
        self.shots = ShotAccuracy(num_classes, prior_shifts)
        self.raw, self.calibrated = Reliability(), Reliability()
        self.confusion = Confusion(num_classes) if confusion and num_classes <= MOST_CLASSES else None

    def start(self, class_counts: Tensor) -> None:
        """Forget what was counted, and take the shot groups of these training counts `[K]`; all 0 if they are unknown."""
        for metric in filter(None, (self.shots, self.raw, self.calibrated, self.confusion)):
            metric.reset()
        if bool(class_counts.any()):
            self.shots.set_class_counts(class_counts)

    def update(self, logits: Tensor, target: Tensor, temperature: Tensor) -> None:
        """Add a batch.

        Args:
            logits: The logits `[B, K]` that decide, any float dtype.
            target: The class indices `[B]`, of any integer dtype.
            temperature: The scalar that divides the logits for calibrated probabilities.
        """
        self.shots.update(logits, target)
        self.raw.update(logits, target)
        self.calibrated.update(logits / temperature, target)
        if self.confusion is not None:
            self.confusion.update(logits, target)

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars by log name: those of `ShotAccuracy`, and `ece` and `ece_calibrated`; every process must call it."""
        errors = {"ece": self.raw.compute().ece.float(), "ece_calibrated": self.calibrated.compute().ece.float()}
        return {**self.shots.compute(), **errors}

    def counts(self) -> Evaluation:
        """Return the counts; every process must call it."""
        confusion = None if self.confusion is None else self.confusion.compute()
        return Evaluation(self.shots.per_class(), confusion, self.raw.compute(), self.calibrated.compute())
