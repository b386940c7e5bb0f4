"""Curves of a collapse over epochs."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from etflight.plotting.canvas import BLUE, DPI, GREEN, GREY, VERMILION, Array, tidy

_STYLES = ("-", "--", ":", "-.")


class _Panel(NamedTuple):
    """One set of axes of `collapse_curves`."""

    title: str
    measures: tuple[str, ...]
    goal: float | None = None
    log: bool = False


_PANELS = (
    _Panel("Variability within classes (NC1)", ("nc1",), log=True),
    _Panel("Alignment of means with class vectors", ("alignment",), goal=1.0),
    _Panel("Distance from a simplex (NC2)", ("nc2_equinorm", "nc2_equiangularity", "etf_distance"), goal=0.0),
    _Panel("Cosines between different classes", ("cos_means", "cos_weights", "cos_cross")),
)
_CALLED = {
    "nc1": r"tr$(\Sigma_W \Sigma_B^{+})/K$",
    "nc1_ratio": r"tr$\,\Sigma_W$ / tr$\,\Sigma_B$",
    "alignment": "cos(mean, class vector)",
    "nc2_equinorm": "spread of norms",
    "nc2_equiangularity": "spread of angles",
    "etf_distance": "distance to nearest ETF",
    "cos_means": "mean, mean",
    "cos_weights": "vector, vector",
    "cos_cross": "mean, vector",
}


def collapse_curves(
    history: Mapping[str, Sequence[float]],
    epochs: Sequence[float],
    *,
    prefix: str = "nc",
    num_classes: int | None = None,
) -> Figure:
    """NC1 on a logarithmic axis, alignment, NC2 and cosines over epochs, one line style per split.

    Measures with an `_std` beside them are drawn with a band of one standard deviation around the first split, `train` if there is one.

    Args:
        history: Log names such as `nc/train/nc1`, with one value per epoch; NaN where a value was not measured. A shorter list belongs to
            the last epochs, for a measure that was not taken from the start.
        epochs: The measured epochs, in order.
        prefix: First part of the log names to draw.
        num_classes: K; draws the simplex's `-1/(K-1)` among the cosines.

    Returns:
        A figure with four axes; each line's label is its log name.

    Raises:
        ValueError: There is nothing to draw.
    """
    x = np.asarray(epochs, dtype=np.float64)
    series = {
        key: np.array([*[np.nan] * (len(x) - len(values)), *values])
        for key, values in history.items()
        if key.startswith(f"{prefix}/") and key.count("/") >= 2
    }
    splits = {key.removeprefix(f"{prefix}/").rpartition("/")[0] for key in series}
    if not splits or len(x) == 0:
        raise ValueError(f"no measure called {prefix}/SPLIT/… in the history: nothing to draw")
    in_order = sorted(splits, key=lambda split: (not split.startswith("train"), not split.startswith("val"), split))
    styles = dict(zip([f"{prefix}/{split}" for split in in_order], cycle(_STYLES), strict=False))

    figure = Figure(figsize=(10, 7.2), dpi=DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        _draw_panel(axes, panel, series, x, styles, num_classes)
    handles = [
        Line2D([], [], color="black", lw=1.8, ls=style, label=split)
        for split, style in zip(in_order, styles.values(), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=11)
    return figure


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    series: Mapping[str, Array],
    x: Array,
    styles: Mapping[str, str],
    num_classes: int | None,
) -> None:
    measures = [m for m in panel.measures if any(f"{split}/{m}" in series for split in styles)]
    if panel.log:
        measures = measures or ["nc1_ratio"]  # the form of NC1 that needs no scatter
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    if panel.goal is not None:
        axes.axhline(panel.goal, color=GREY, lw=1, ls=(0, (1, 2)), zorder=0)
    legend = []
    look: dict[str, Any] = {"lw": 1.8, "marker": "o" if len(x) <= 25 else "", "ms": 3.5, "zorder": 3}
    for colour, measure in zip((BLUE, VERMILION, GREEN), measures, strict=False):
        drawn = {split: f"{split}/{measure}" for split in styles if f"{split}/{measure}" in series}
        for split, key in drawn.items():
            axes.plot(x, series[key], ls=styles[split], color=colour, label=key, **look)
            if split == next(iter(styles)) and f"{key}_std" in series:
                low, high = series[key] - series[f"{key}_std"], series[key] + series[f"{key}_std"]
                axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        if drawn:
            legend.append(Line2D([], [], color=colour, lw=1.8, label=_CALLED[measure]))
    if "cos_means" in measures and num_classes is not None and num_classes > 1:
        goal = axes.axhline(-1 / (num_classes - 1), color="black", lw=1.2, ls=(0, (1, 2)), label="simplex: −1/(K−1)")
        legend.append(goal)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(legend) > 1:
        axes.legend(handles=legend, frameon=False, fontsize=9)
    elif legend:
        axes.set_ylabel(str(legend[0].get_label()))
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
    tidy(axes)
