"""Pictures of neural collapse at one moment."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from etflight.metrics import Moments, measures
from etflight.metrics.measures import effective_rank_of_values
from etflight.plotting.canvas import (
    BLUE,
    VERMILION,
    Array,
    Matrix,
    Numbers,
    as_array,
    heat_map,
    name_points,
    names_or_numbers,
    plottable_classes,
    points_by_size,
    single_axes,
)
from etflight.utils.arrays import evenly

_MOST_CLASSES = 1000  # sides of the largest heat map: a picture has no pixels for more cells


def portrait(
    stats: Moments,
    weight: Matrix | None = None,
    *,
    counts: Numbers | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Figure]:
    """Every picture that can be drawn of one measurement.

    Args:
        stats: Class statistics of K classes.
        weight: `[K, d]`, class vectors for these features; without them there is no heat map.
        counts: `[K]`, training images per class; by default the samples that `stats` saw.
        class_names: `[K]`; the labels as numbers by default.

    Returns:
        `heat_map`, `variability` and `spectrum`; without the first and the last if fewer than two classes have samples.
    """
    figures = {}
    singular = measures.spectrum(stats)
    if weight is not None and len(singular):
        figures["heat_map"] = cosine_heatmap(stats.means, weight, class_names)
    sizes = stats.counts if counts is None else counts
    figures["variability"] = variability_by_size(stats.variances, sizes, class_names)
    if len(singular):
        figures["spectrum"] = spectrum(singular)
    return figures


def cosine_heatmap(
    means: Matrix, weight: Matrix, class_names: Sequence[str] | None = None, *, title: str | None = None
) -> Figure:
    """Heat map of `cos(μ_i - μ_G, w_j - w̄)`: 1 on the diagonal and -1/(K-1) elsewhere under perfect collapse.

    Cells hold their values up to K = 12. Above K = 1000 an even choice of 1000 classes is drawn, and the title says so.

    Args:
        means: `[K, d]`, class means. A class without samples has a row of NaN: its cells are grey, and `μ_G` and `w̄` leave it out.
        weight: `[K, d]`, class vectors.
        class_names: `[K]`; the labels as numbers by default.
        title: The picture's title; a general one by default.

    Returns:
        A figure with one image; its data are the cosines, `[K, K]`, classes' means in rows.
    """
    M, W = as_array(means), as_array(weight)
    K = len(M)
    shown = evenly(K, _MOST_CLASSES)
    names = names_or_numbers(class_names, K)
    figure, axes, bar = heat_map(
        _cosines(M, W)[np.ix_(shown, shown)],
        [names[k] for k in shown],
        lambda value: "–" if np.isnan(value) else f"{value:.2f}".replace("-", "−"),
        white_above=0.6,
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
    )
    choice = f" ({len(shown)} of {K} classes)" if len(shown) < K else ""
    axes.set_title(f"Centred class means against class vectors{choice}" if title is None else title)
    axes.set(xlabel="class vector", ylabel="class mean")
    bar.set_label("cosine")
    return figure


def _cosines(means: Array, weight: Array) -> Array:
    present = torch.as_tensor(means).isfinite().all(1)
    units = []
    for rows in map(torch.as_tensor, (means, weight)):
        centred = rows.where(present[:, None], torch.nan) - rows[present].mean(0)
        units.append(centred / centred.norm(dim=1, keepdim=True))
    cosines: Array = (units[0] @ units[1].T).numpy()
    return cosines


def spectrum(values: Numbers) -> Figure:
    """The singular values of the centred means beside the flat spectrum of a simplex with the same Frobenius norm.

    Args:
        values: `[min(K - 1, d)]`, as `etflight.metrics.measures.spectrum` gives them.

    Returns:
        A figure with the values as its first line and the flat reference as its second; the title has the effective rank.
    """
    singular = np.sort(as_array(values))[::-1].copy()
    n = len(singular)
    index = np.arange(1, n + 1)
    flat = np.sqrt(np.mean(singular**2))
    figure, axes = single_axes()
    marker = "o" if n <= 60 else ""
    axes.plot(index, singular, marker=marker, color=BLUE, ms=6, lw=2, label="class means, centred", zorder=3)
    axes.plot([0.5, n + 0.5], [flat, flat], "--", color=VERMILION, lw=1.8, label="simplex ETF of the same size")
    axes.margins(x=0, y=0.2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    rank = float(effective_rank_of_values(torch.from_numpy(singular)))
    axes.set(xlabel="index", ylabel="singular value", title=f"Spectrum: effective rank {rank:.1f} of {n}")
    axes.legend(loc="upper right", ncols=2, frameon=False)
    return figure


def variability_by_size(variances: Numbers, counts: Numbers, class_names: Sequence[str] | None = None) -> Figure:
    """Each class's variance against its number of training images, on a logarithmic axis.

    Variances are on a logarithmic axis too if they span more than a factor of 20. Classes of variance zero, such as those with a single
    sample, are hollow and sit on the lower edge. Up to 20 classes are all named; of more, the three most and the three least variable.

    Args:
        variances: `[K]`, such as `Moments.variances`; NaN is left out.
        counts: `[K]`, training images per class.
        class_names: `[K]`; the labels as numbers by default.

    Returns:
        A figure whose first collection holds the points `(count, variance)`.
    """
    y, x, names, shown = plottable_classes(variances, counts, class_names)
    positive, zero = shown[y[shown] > 0], shown[y[shown] <= 0]
    figure, axes = points_by_size(x[positive], y[positive])
    axes.margins(y=0.12)
    if len(positive) and y[positive].max() > 20 * y[positive].min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(zero):
        where, edge = axes.get_xaxis_transform(), np.full(len(zero), 0.012)
        axes.scatter(x[zero], edge, s=40, facecolors="none", edgecolors=VERMILION, transform=where, zorder=4)
        axes.text(0.99, 0.96, "hollow: variance 0", transform=axes.transAxes, ha="right", fontsize=9, color=VERMILION)
    by_variance = positive[np.argsort(y[positive])]
    named = by_variance if len(positive) <= 20 else np.concatenate([by_variance[:3], by_variance[-3:]])
    name_points(axes, x[named], y[named], [names[k] for k in named])
    axes.set(ylabel="variance of the class", title="Variability within a class against its size")
    return figure
