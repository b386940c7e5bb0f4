"""Metrics that use private names of torchmetrics."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from etflight.utils.precision import with_float64


class ExactMetric(Metric):
    """A metric made of sums: processes add them by all-reduce, and they keep their dtypes in a network that is cast.

    torchmetrics itself gathers the states of all processes and stacks them, which takes a copy of each state for each process. A metric
    of a network on a device without float64 stays in host memory.

    Touches `_sync_dist`, `_reduce_states`, `_wrap_update`, `_apply`, `_load_from_state_dict`, `_defaults`, `_computed` and `_update_count`
    of `Metric`.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.long, reduction: str | None = "sum") -> None:
        """Add a state of zeros."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx=reduction)
        # `reset` clones the default, so an expanded zero suffices
        self._defaults[name] = torch.zeros((), dtype=dtype).expand(shape)

    def sum_over_processes(self, group: Any) -> None:
        """Replace each state by its sum over the processes of a group."""
        for name in self.metric_state:
            state: Tensor = getattr(self, name).clone()  # a collection may have given other metrics the same tensor
            dist.all_reduce(state, group=group)
            setattr(self, name, state)

    def add_states(self, incoming: dict[str, Any]) -> None:
        """Add the states of another instance; `forward` and `merge_state` call this."""
        super()._reduce_states(incoming)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        self.sum_over_processes(process_group or self.process_group)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self.add_states(incoming_state)
        self._forget_result()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torchmetrics would keep the checkpoint's own tensors, on the checkpoint's device, and update them in place
        found = {name: state_dict.pop(prefix + name) for name in self._defaults if prefix + name in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, value in found.items():
            getattr(self, name).copy_(value)
            self._forget_result()

    def _forget_result(self) -> None:
        """Make the next `compute` use the states, which have changed without an update."""
        self._computed = None
        self._update_count = max(self._update_count, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # torchmetrics itself guards against `module.half()`, but not against `module.to(torch.float16)`
        device = with_float64(fn(torch.empty(0, device=self.device)).device)
        return super()._apply(lambda state: state.to(device), exclude_state)

    def _wrap_update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(update)
        def moved(*args: Any, **kwargs: Any) -> Any:
            return update(*map(_moved, args), **{name: _moved(value) for name, value in kwargs.items()})

        return super()._wrap_update(moved)


def _moved(value: Any) -> Any:
    """A tensor where it can be converted to float64; any other value as it is."""
    return value.to(with_float64(value.device)) if isinstance(value, Tensor) else value


def add_saved_state(metric: Metric, state: dict[str, Any]) -> None:
    """Add a saved state to a metric; a metric that has counted nothing yet takes exactly that state.

    Touches `Metric._update_count`, which says whether it has counted anything.
    """
    if metric.update_called:
        metric.merge_state(state)
        return
    for name, value in state.items():
        setattr(metric, name, value)
    metric._update_count = 1
