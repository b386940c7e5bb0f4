"""The mean of a loss over the samples of an epoch."""

import torch
from torch import Tensor

from etflight.metrics.summed import SummedMetric


class SampleMean(SummedMetric):
    """The mean over samples of what batches report as their own mean, whatever their sizes and ranks.

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
        """Add the mean, a scalar, of a batch of that many samples."""
        self.total += mean.detach().double() * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """Scalar float32, NaN when nothing was seen."""
        return (self.total / self.samples).float()
