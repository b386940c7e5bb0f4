"""How honest probabilities are, and the temperature that makes them so: one pass, states of constant size."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from etflight.metrics.summed import SummedMetric
from etflight.precision import at_least_float32

_COARSEST, _FINEST, _STEPS = 100.0, 0.002, 109  # a ratio of 1.105 between neighbours
_ROUNDING = 1e-6  # of a sum of float32 losses


class ReliabilityBins(NamedTuple):
    """Samples by the confidence of their decision, in M bins of equal width; bin m holds (m/M, (m+1)/M].

    Attributes:
        counts: `[M]` int64, samples.
        confidence: `[M]` float64, their mean largest probability; NaN in an empty bin.
        accuracy: `[M]` float64, the share of them that is right; NaN in an empty bin.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> Tensor:
        """Expected calibration error, `Σ_m n_m/N |accuracy_m - confidence_m|`: a float64 scalar, NaN when nothing was seen."""
        gaps = (self.accuracy - self.confidence).abs()
        return torch.where(self.counts > 0, self.counts * gaps, 0.0).sum() / self.counts.sum()


class Reliability(SummedMetric):
    """What a reliability diagram shows, and the expected calibration error that sums it up.

    Args:
        bins: M >= 1; the field's comparisons have 15.

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

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.add_sum("counts", bins)
        self.add_sum("correct", bins)
        self.add_sum("confidence", bins, dtype=torch.double)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: `[B, K]`, any float dtype.
            target: class indices `[B]`, int64.
        """
        confidence, predicted = at_least_float32(logits).softmax(dim=1).max(dim=1)
        inner = torch.arange(1, len(self.counts), dtype=confidence.dtype, device=confidence.device) / len(self.counts)
        bins = torch.bucketize(confidence, inner)
        self.counts.index_add_(0, bins, torch.ones_like(bins))
        self.correct.index_add_(0, bins, (predicted == target).long())
        self.confidence.index_add_(0, bins, confidence.double())

    def compute(self) -> ReliabilityBins:
        """Means over what all processes have seen."""
        return ReliabilityBins(self.counts.clone(), self.confidence / self.counts, self.correct.double() / self.counts)


class TemperatureFit(SummedMetric):
    """The temperature T that minimises the negative log-likelihood of `softmax(logits / T)`.

    The likelihood is summed on a logarithmic grid of temperatures, so ranks add and no logits are kept; the minimum is refined by
    the parabola through its three lowest points. Where it lies at an end of the grid, as where every decision is right and T would fall
    for ever, T is the largest whose likelihood is at least 1/e of the best: for N right decisions their mean confidence is then about
    1 - 1/N. Where no temperature is better than another, T is 1.

    Attributes:
        doubt: why the T computed last cannot be trusted, in words; None if it can.

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
            logits: `[B, K]`, any float dtype.
            target: class indices `[B]`, int64.
        """
        logits = at_least_float32(logits)
        shifted = logits - logits.gather(1, target[:, None])
        self.losses += torch.stack([(shifted / t).logsumexp(dim=1).sum() for t in self._grid().exp()])
        self.samples += len(target)

    def compute(self) -> Tensor:
        """T in [0.002, 100], a float32 scalar; 1 when nothing was seen."""
        losses, lowest, images, grid = self.losses, self.losses.min(), int(self.samples), self._grid()
        self.doubt = None
        if not losses.max() - lowest > _ROUNDING * lowest:  # or they are not numbers
            self.doubt = f"to {images} held-out images all are alike" if images else None
            return torch.ones_like(grid[0])
        if lowest in (losses[0], losses[-1]):
            all_right = lowest < math.log(2)  # a wrong decision costs more at any temperature
            why = "are right and would have it fall for ever" if all_right else "ask for one beyond the range searched"
            self.doubt = f"{images} held-out images {why}"
            return grid[losses <= lowest + 1].max().exp()
        best = losses.argmin()
        left, middle, right = losses[best - 1], losses[best], losses[best + 1]
        offset = (0.5 * (left - right) / (left - 2 * middle + right)).nan_to_num(0.0).clamp(-1, 1)
        return (grid[best] + offset.float() * (grid[1] - grid[0])).exp()

    def _grid(self) -> Tensor:
        """Logarithms of the temperatures; no buffer, which averaging weights would move."""
        ends = math.log(_FINEST), math.log(_COARSEST)
        return torch.linspace(*ends, _STEPS, dtype=torch.float32, device=self.losses.device)
