"""The temperature that makes probabilities honest, fitted in one pass with a state of constant size."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

_COARSEST, _FINEST, _STEPS = 100.0, 0.002, 109  # a ratio of 1.105 between neighbours


class TemperatureFit(Metric):
    """The temperature T that minimises the negative log-likelihood of `softmax(logits / T)`.

    The likelihood is summed on a logarithmic grid of temperatures, so ranks add and no logits are kept; the minimum is refined by
    the parabola through its three lowest points.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """

    full_state_update = False
    losses: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", torch.zeros(_STEPS, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add logits `[B, K]` and class indices `[B]`."""
        logits = logits.float()
        shifted = logits - logits.gather(1, target[:, None])
        self.losses += torch.stack([(shifted / t).logsumexp(dim=1).sum() for t in self._grid().exp()])
        self.samples += len(target)

    def compute(self) -> Tensor:
        """T > 0, a scalar; 1 when nothing was seen."""
        best = self.losses.argmin().clamp(1, _STEPS - 2)
        left, middle, right = self.losses[best - 1], self.losses[best], self.losses[best + 1]
        curvature = left - 2 * middle + right
        offset = torch.where(curvature > 0, 0.5 * (left - right) / curvature.clamp(min=1e-300), 0.0).clamp(-1, 1)
        grid = self._grid()
        temperature = (grid[best] + offset.float() * (grid[1] - grid[0])).exp()
        return torch.where(self.samples > 0, temperature, 1.0)

    def _grid(self) -> Tensor:
        """Logarithms of the temperatures; no buffer, which averaging weights would move."""
        return torch.linspace(math.log(_FINEST), math.log(_COARSEST), _STEPS, device=self.losses.device)
