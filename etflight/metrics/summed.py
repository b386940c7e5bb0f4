"""The bases of metrics: states that stay exact; states that are sums over samples."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors


class ExactMetric(Metric):
    """A metric whose states keep their dtypes when the network that it belongs to is put into half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move to where `fn` does; torchmetrics itself guards against `module.half()`, but not against `module.to(torch.float16)`."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda state: state.to(device), exclude_state)


class SummedMetric(ExactMetric):
    """A metric that only adds: its states are sums, and processes are summed by all-reduce.

    torchmetrics itself gathers every process's state and stacks them, which for a `[K, K]` state is a copy for each process.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.long) -> None:
        """Add a state of zeros."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        for name in self._defaults:
            state: Tensor = getattr(self, name).contiguous()
            dist.all_reduce(state, group=process_group or self.process_group)
            setattr(self, name, state)
