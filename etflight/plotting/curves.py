"""Curves of a collapse over epochs."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from etflight.plotting.canvas import BLUE, DPI, GREEN, GREY, VERMILION, Array, tidy

__all__ = ["collapse_curves"]

_STYLES = ("-", "--", ":", "-.")


class _Panel:
    """One set of axes of `collapse_curves`: a title and, in order of preference, what goes in."""

    def __init__(self, title: str, *measures: str, goal: float | None = None, log: bool = False) -> None:
        self.title, self.measures, self.goal, self.log = title, measures, goal, log


_PANELS = (
    _Panel("Variability within classes (NC1)", "nc1", log=True),
    _Panel("Alignment of means with class vectors", "alignment", goal=1.0),
    _Panel("Distance from a simplex (NC2)", "nc2_equinorm", "nc2_equiangularity", "etf_distance", goal=0.0),
    _Panel("Cosines between different classes", "cos_means", "cos_weights", "cos_cross"),
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
    title: str | None = None,
) -> Figure:
    """NC1 on a logarithmic axis, alignment, NC2 and cosines over epochs, one line style per split.

    Measures with an `_std` beside them are drawn with a band of one standard deviation around the first split, `train` if there is one.

    Args:
        history: log names such as `nc/train/nc1`, with one value per epoch; NaN where a value was not measured. A shorter list belongs to
            the last epochs, as that of a measure that was not there from the start.
        epochs: measured epochs, in order.
        prefix: first part of the log names to draw.
        num_classes: K; draws the simplex's `-1/(K-1)` among the cosines.
        title: over the picture.

    Returns:
        A figure with four axes; each line's label is its log name.

    Raises:
        ValueError: nothing to draw.
    """
    splits: list[str] = []
    for key in history:
        if key.startswith(f"{prefix}/") and key.count("/") >= 2:
            split = key.removeprefix(f"{prefix}/").rpartition("/")[0]
            splits += [split] if split not in splits else []
    splits.sort(key=lambda split: (not split.startswith("train"), not split.startswith("val"), split))
    x = np.asarray(epochs, dtype=np.float64)
    if not splits or len(x) == 0:
        raise ValueError(f"no measure called {prefix}/SPLIT/… in the history: nothing to draw")

    figure = Figure(figsize=(10, 7.2), dpi=DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        _draw_panel(axes, panel, history, x, prefix, splits, num_classes)
    styles = [
        Line2D([], [], color="black", lw=1.8, ls=_STYLES[i % len(_STYLES)], label=s) for i, s in enumerate(splits)
    ]
    figure.legend(handles=styles, loc="outside lower center", ncols=len(styles), frameon=False, fontsize=11)
    if title:
        figure.suptitle(title)
    return figure


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    history: Mapping[str, Sequence[float]],
    x: Array,
    prefix: str,
    splits: Sequence[str],
    num_classes: int | None,
) -> None:
    measures = [m for m in panel.measures if any(f"{prefix}/{split}/{m}" in history for split in splits)]
    if not measures and panel.log:
        measures = ["nc1_ratio"]  # what there is of NC1 without the scatter
    if panel.log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    if panel.goal is not None:
        axes.axhline(panel.goal, color=GREY, lw=1, ls=(0, (1, 2)), zorder=0)
    legend = []
    for colour, measure in zip((BLUE, VERMILION, GREEN), measures, strict=False):
        drawn = False
        for i, split in enumerate(splits):
            key = f"{prefix}/{split}/{measure}"
            values = _series(history, key, x)
            if values is None:
                continue
            marker = "o" if len(x) <= 25 else ""
            axes.plot(
                x,
                values,
                ls=_STYLES[i % len(_STYLES)],
                color=colour,
                lw=1.8,
                marker=marker,
                ms=3.5,
                label=key,
                zorder=3,
            )
            drawn = True
            spread = _series(history, f"{key}_std", x) if i == 0 else None
            if spread is not None:
                axes.fill_between(x, values - spread, values + spread, color=colour, alpha=0.12, lw=0)
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


def _series(history: Mapping[str, Sequence[float]], key: str, x: Array) -> Array | None:
    if key not in history:
        return None
    values = np.asarray(history[key], dtype=np.float64)[-len(x) :]
    return np.concatenate([np.full(len(x) - len(values), np.nan), values])
