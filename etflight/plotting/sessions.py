"""Accuracies over the sessions of class-incremental learning."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from etflight.plotting.canvas import BLUE, GREEN, VERMILION, single_axes

_LINES = (
    ("acc", "all classes seen", BLUE, "-"),
    ("acc_base", "base classes", GREEN, "--"),
    ("acc_new", "new classes", VERMILION, ":"),
)


def session_curves(results: Sequence[Mapping[str, Any]], classes: Sequence[int]) -> Figure:
    """Draw the accuracies on all, base and new classes after each session.

    Args:
        results: The results of the sessions, as `etflight.analysis.incremental.score` gives them.
        classes: The number of classes seen after each session.

    Returns:
        A figure with one set of axes; each line's label says which classes it is about.

    Raises:
        ValueError: There is no session.
    """
    if not results:
        raise ValueError("no session: nothing to draw")
    figure, axes = single_axes()
    x = np.arange(len(results))
    for name, label, colour, style in _LINES:
        values = [np.nan if row[name] is None else row[name] for row in results]
        axes.plot(x, values, ls=style, marker="o", ms=5, lw=1.8, color=colour, label=label, zorder=3)
    step = -(-len(x) // 12)
    axes.set_xticks(x[::step], [f"{s}\n{classes[s]}" for s in x[::step].tolist()])
    axes.set(xlabel="session, and classes seen so far", ylabel="accuracy on test images", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
