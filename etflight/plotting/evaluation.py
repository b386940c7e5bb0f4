"""Pictures of a test: how honest its probabilities are, which class is taken for which, how accuracy depends on the number of images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from etflight.metrics.accuracy import FEW_BELOW, MANY_ABOVE, ReliabilityBins
from etflight.plotting.canvas import (
    BLUE,
    DPI,
    GREY,
    VERMILION,
    Matrix,
    Numbers,
    as_array,
    heat_map,
    name_points,
    names_or_numbers,
    plottable_classes,
    points_by_size,
    tidy,
)


def reliability_diagram(panels: dict[str, ReliabilityBins]) -> Figure:
    """Accuracy against confidence, bin by bin, over the share of images in each bin.

    Bars on the diagonal are honest; bars below it are too confident. The gap to the mean confidence is hatched.

    Args:
        panels: The bins by name, such as `{"raw": …, "temperature 0.31": …}`; one column each.

    Returns:
        A figure with two axes for each panel, in columns; the upper one's first container holds the bars of accuracy.
    """
    figure = Figure(figsize=(0.6 + 4.2 * len(panels), 5.6), dpi=DPI, layout="constrained")
    rows = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for column, (name, bins) in enumerate(panels.items()):
        upper, lower = rows[:, column]
        counts, confidence, accuracy = as_array(bins.counts), as_array(bins.confidence), as_array(bins.accuracy)
        width = 1 / len(counts)
        middle = (np.arange(len(counts)) + 0.5) * width
        upper.bar(middle, accuracy, width, color=(BLUE, 0.5), edgecolor="white", lw=0.6, label="accuracy", zorder=2)
        upper.bar(
            middle, confidence - accuracy, width, accuracy, facecolor="none", edgecolor=VERMILION, hatch="////", lw=0.8,
            label="gap to the mean confidence", zorder=3,
        )  # fmt: skip
        upper.plot([0, 1], [0, 1], "--", color=GREY, lw=1.5, zorder=4)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        upper.set_title(f"{name}: ECE {100 * float(bins.ece):.1f} %", fontsize=11)
        lower.bar(middle, counts / max(counts.sum(), 1), width, color=GREY, edgecolor="white", lw=0.6, zorder=2)
        lower.set_xlabel("confidence")
        tidy(upper)
        tidy(lower)
    rows[0, 0].set_ylabel("accuracy")
    rows[1, 0].set_ylabel("share of images")
    rows[0, 0].legend(loc="upper left", fontsize=9, framealpha=0.9, edgecolor="none")
    return figure


def confusion_matrix(counts: Matrix, class_names: Sequence[str] | None = None) -> Figure:
    """Heat map of which class is taken for which, in shares of each true class.

    The colour goes with the square root, so that rare confusions show. Cells hold their per cents up to K = 12.

    Args:
        counts: `[K, K]`, images, true classes in rows; a class without images has an empty row.
        class_names: `[K]`; the labels as numbers by default.

    Returns:
        A figure with one image; its data are the shares, `[K, K]`.
    """
    cells = as_array(counts)
    with np.errstate(invalid="ignore"):
        shares = cells / cells.sum(1, keepdims=True)
    names = names_or_numbers(class_names, len(cells))
    figure, axes, bar = heat_map(shares, names, _per_cent, white_above=0.3, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    axes.set(xlabel="decision", ylabel="true class", title="Which class is taken for which")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the true class")
    return figure


def _per_cent(share: float) -> str:
    if not share > 0:
        return ""
    return f"{100 * share:.0f}" if share >= 0.01 else "<1"


def accuracy_by_size(accuracy: Numbers, counts: Numbers, class_names: Sequence[str] | None = None) -> Figure:
    """Each class's accuracy against its number of training images, on a logarithmic axis with the limits of the shot groups.

    Up to 20 classes are all named; of more, the three worst.

    Args:
        accuracy: `[K]`; NaN is left out.
        counts: `[K]`, training images per class; classes without any are left out.
        class_names: `[K]`; the labels as numbers by default.

    Returns:
        A figure whose first collection holds the points `(count, accuracy)`.
    """
    y, x, names, shown = plottable_classes(accuracy, counts, class_names)
    figure, axes = points_by_size(x[shown], y[shown])
    lowest = max(0.0, np.floor(10 * y[shown].min() - 0.5) / 10) if len(shown) else 0.0
    axes.set_ylim(lowest - 0.04 * (1 - lowest), 1 + 0.08 * (1 - lowest))
    left, right = axes.get_xlim()
    for limit, text, side in ((FEW_BELOW, "few", "right"), (MANY_ABOVE, "many", "left")):
        if left < limit < right:
            axes.axvline(limit, color=GREY, lw=1.2, ls=(0, (4, 3)), zorder=1)
            axes.annotate(
                text, (limit, 0), (-4 if side == "right" else 4, 5), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha=side, fontsize=9, color=GREY,
            )  # fmt: skip
    worst_first = shown[np.argsort(y[shown], kind="stable")]
    named = worst_first if len(shown) <= 20 else worst_first[:3]
    name_points(axes, x[named], y[named], [names[k] for k in named])
    axes.set(ylabel="accuracy of the class", title="Accuracy of a class against its size")
    return figure
