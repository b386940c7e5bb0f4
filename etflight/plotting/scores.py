"""Pictures of out-of-distribution detection: the scores of known and of unknown images."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from etflight.plotting.canvas import BLUE, DPI, VERMILION, Array, Numbers, as_array, tidy
from etflight.utils.errors import UserError

_MOST_BINS = 60
# per cent of either kind's images that may lie beyond each end of the axis, where they count in the last bin
_TAIL = 0.5


def score_histograms(panels: Mapping[str, tuple[Numbers, Numbers]], known: str, unknown: str) -> Figure:
    """The distributions of scores of known and of unknown images; the less they overlap, the better a score tells them apart.

    Each distribution has area 1, whatever its number of images. The few most extreme scores count in the first and in the last bin.

    Args:
        panels: The scores of the known and of the unknown images, `[N]` and `[M]`, by the title of their panel, such as
            `{"energy: AUROC 93.1 %": …}`.
        known: The name of the known images, for the legend.
        unknown: The name of the unknown images.

    Returns:
        A figure with one axes for each panel, in rows of at most four; their first two patches are the histograms.

    Raises:
        UserError: A score is not finite.
    """
    columns = min(4, max(1, math.ceil(math.sqrt(len(panels)))))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(0.3 + 3.1 * columns, 0.7 + 2.2 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(panels) :]:
        axes.remove()
    names = [name.replace("$", r"\$") for name in (known, unknown)]  # a bare dollar would start a formula
    for axes, (title, scores) in zip(grid, panels.items(), strict=False):
        both = [as_array(part) for part in scores]
        if broken := sum(int((~np.isfinite(part)).sum()) for part in both):
            count = sum(map(len, both))
            raise UserError(f"{broken} of {count} scores of {title} are NaN or infinite: leave those images out")
        edges = _edges(both)
        for values, colour, name in zip(both, (BLUE, VERMILION), names, strict=True):
            inside = values.clip(edges[0], edges[-1])
            axes.hist(
                inside, edges, density=True, histtype="stepfilled", color=(colour, 0.45), edgecolor=colour, lw=1, label=name
            )  # fmt: skip
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=8)
        tidy(axes)
        axes.spines["left"].set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=10, frameon=False)
    figure.supxlabel("score: larger is more like the known classes", fontsize=10)
    return figure


def _edges(both: list[Array]) -> Array:
    """The edges of bins that show nearly all scores of either kind."""
    low = min(np.percentile(values, _TAIL) for values in both)
    high = max(np.percentile(values, 100 - _TAIL) for values in both)
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # one value for all
        low, high = low - 0.5, high + 0.5
    # few images would make a comb of many bins
    bins = min(_MOST_BINS, max(10, int(2 * math.sqrt(min(map(len, both))))))
    return np.linspace(low, high, bins + 1)
