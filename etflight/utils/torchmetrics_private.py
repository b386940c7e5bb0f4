"""Private names of torchmetrics, each in one small function."""

from typing import Any

from torchmetrics import Metric


def add_state(metric: Metric, state: dict[str, Any]) -> None:
    """Add a state to what a metric has counted; bit by bit that state where it has counted nothing yet.

    Touches `Metric._update_count`, which says whether it has.
    """
    if metric.update_called:
        metric.merge_state(state)
        return
    for name, value in state.items():
        setattr(metric, name, value)
    metric._update_count = 1
