"""Which class is taken for which."""

import torch
from torch import Tensor

from etflight.metrics.summed import SummedMetric

MOST_CLASSES = 1000  # 8 MB; more cells than that are more than a picture has pixels


class Confusion(SummedMetric):
    """Counts of (true, predicted) pairs.

    Args:
        num_classes: K, at most `MOST_CLASSES`.

    Raises:
        ValueError: more classes than that.

    Example:
        >>> metric = Confusion(2)
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        >>> metric.compute().tolist()
        [[1, 1], [0, 1]]
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes > MOST_CLASSES:
            raise ValueError(f"confusion counts of {num_classes} classes: at most {MOST_CLASSES} are kept")
        self.add_sum("counts", num_classes, num_classes)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: class indices `[B]`, int64, in [0, K).
            target: the true ones, likewise.
        """
        cells = target * len(self.counts) + predicted
        self.counts.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> Tensor:
        """Int64 `[K, K]`, true classes in rows."""
        return self.counts.clone()
