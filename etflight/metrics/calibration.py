"""How honest probabilities are, and the temperature that makes them so: one pass, states of constant size."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from etflight.metrics.summed import SummedMetric
from etflight.precision import at_least_float32

_COARSEST, _FINEST, _STEPS = 100.0, 0.002, 109  # a ratio of 1.105 between neighbours


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
    the parabola through its three lowest points.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """

    losses: Tensor
    samples: Tensor

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
        best = self.losses.argmin().clamp(1, _STEPS - 2)
        left, middle, right = self.losses[best - 1], self.losses[best], self.losses[best + 1]
        curvature = left - 2 * middle + right
        offset = torch.where(curvature > 0, 0.5 * (left - right) / curvature.clamp(min=1e-300), 0.0).clamp(-1, 1)
        grid = self._grid()
        temperature = (grid[best] + offset.float() * (grid[1] - grid[0])).exp()
        return torch.where(self.samples > 0, temperature, 1.0)

    def _grid(self) -> Tensor:
        """Logarithms of the temperatures; no buffer, which averaging weights would move."""
        ends = math.log(_FINEST), math.log(_COARSEST)
        return torch.linspace(*ends, _STEPS, dtype=torch.float32, device=self.losses.device)
