"""Pictures of neural collapse at one moment."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from etflight.metrics import Moments, measures
from etflight.metrics.measures import GlobalMean, effective_rank_of_values
from etflight.plotting.canvas import (
    BLUE,
    DPI,
    VERMILION,
    Array,
    Matrix,
    Numbers,
    as_array,
    class_sizes,
    name_points,
    name_ticks,
    short,
    single_axes,
    size_axis,
)

__all__ = ["cosine_heatmap", "portrait", "spectrum", "variability_by_size"]


_MOST_CLASSES = 1000  # sides of the largest heat map: more cells than that are more than a picture has pixels


def portrait(
    stats: Moments,
    weight: Matrix | None = None,
    *,
    counts: Numbers | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Figure]:
    """What can be drawn of one measurement.

    Args:
        stats: class statistics of K classes.
        weight: `[K, d]`, class vectors that meet these features; without, there is no heat map.
        counts: `[K]`, training images per class; by default the samples that `stats` saw.
        class_names: `[K]`; the labels as numbers by default.

    Returns:
        `heat_map`, `variability` and `spectrum`; without the first and the last if fewer than two classes have samples.
    """
    figures = {}
    singular = measures.spectrum(stats)
    if weight is not None and len(singular):
        figures["heat_map"] = cosine_heatmap(stats.means, weight, class_names)
    figures["variability"] = variability_by_size(
        stats.variances, stats.counts if counts is None else counts, class_names
    )
    if len(singular):
        figures["spectrum"] = spectrum(singular)
    return figures


def cosine_heatmap(
    means: Matrix,
    weight: Matrix,
    class_names: Sequence[str] | None = None,
    *,
    title: str | None = None,
    global_mean: GlobalMean = "class",
    counts: Numbers | None = None,
    center_weight: bool = True,
) -> Figure:
    """Heat map of `cos(μ_i - μ_G, w_j - w̄)`: 1 on the diagonal and -1/(K-1) elsewhere under perfect collapse.

    Cells hold their values up to K = 12. Above K = 1000 an even choice of 1000 classes is drawn, and the title says so.

    Args:
        means: `[K, d]`, class means; rows of classes without samples are NaN, and so are their cells.
        weight: `[K, d]`, class vectors.
        class_names: `[K]`; the labels as numbers by default.
        title: over the picture; a general one by default.
        global_mean: how classes weigh in `μ_G`, as in `etflight.metrics.measures`.
        counts: `[K]`, samples per class, needed for `global_mean="sample"`.
        center_weight: subtract `w̄` first.

    Returns:
        A figure with one image; its data are the cosines, `[K, K]`, classes' means in rows.

    Raises:
        ValueError: shapes that do not fit.
    """
    M, W = as_array(means), as_array(weight)
    if M.shape != W.shape or M.ndim != 2:
        raise ValueError(f"means and class vectors must both be [K, d], got {list(M.shape)} and {list(W.shape)}")
    K = len(M)
    cosines = _cosines(M, W, _mean_weights(M, global_mean, counts), center_weight)
    shown = np.unique(np.linspace(0, K - 1, min(K, _MOST_CLASSES)).round().astype(int))
    cosines = cosines[np.ix_(shown, shown)]
    names = [str(k) for k in shown] if class_names is None else [class_names[k] for k in shown.tolist()]

    size = 7.0 if K <= 40 else 8.5
    figure = Figure(figsize=(size, 0.88 * size), dpi=DPI if K <= 200 else 200, layout="compressed")
    axes = figure.add_subplot()
    axes.set_facecolor("#d0d0d0")
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation_stage="rgba")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("cosine")
    default = "Centred class means against class vectors"
    if len(shown) < K:
        default += f" ({len(shown)} of {K} classes)"
    axes.set_title(title if title is not None else default)
    axes.set_xlabel("class vector")
    axes.set_ylabel("class mean")
    name_ticks(axes, names)
    if len(names) <= 12:
        for i, j in np.ndindex(*cosines.shape):
            value = cosines[i, j]
            text = "–" if np.isnan(value) else f"{value:.2f}".replace("-", "−")
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=9 if len(names) <= 10 else 8, color=colour)
    return figure


def _mean_weights(means: Array, global_mean: GlobalMean, counts: Numbers | None) -> Array:
    present = _present(means)
    if global_mean == "class":
        weights = present.astype(np.float64)
    elif global_mean == "sample":
        if counts is None:
            raise ValueError('global_mean="sample" needs counts')
        weights = as_array(counts) * present
    else:
        raise ValueError(f'global_mean is "class" or "sample", got {global_mean!r}')
    normalised: Array = weights / max(weights.sum(), 1.0)
    return normalised


def _present(means: Array) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(means).all(axis=1))


def _cosines(means: Array, weight: Array, mean_weights: Array, center_weight: bool) -> Array:
    present = _present(means)
    centred: Array = means - mean_weights @ np.where(present[:, None], means, 0.0)
    # As the measures have it, vectors of classes without samples take no part in their mean.
    vectors: Array = np.where(present[:, None], weight, np.nan)
    if center_weight and present.any():
        vectors = vectors - weight[present].mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        right = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Array = left @ right.T
    return result


def spectrum(values: Numbers, *, title: str | None = None) -> Figure:
    """The singular values of the centred means beside the flat spectrum of a simplex with the same Frobenius norm.

    Args:
        values: `[min(K - 1, d)]`, as `etflight.metrics.measures.spectrum` gives them.
        title: over the picture; names the effective rank by default.

    Returns:
        A figure with the values as its first line and the flat reference as its second.

    Raises:
        ValueError: no values.
    """
    singular = np.sort(as_array(values).reshape(-1))[::-1]
    if len(singular) == 0:
        raise ValueError("the spectrum is empty: it takes two classes with samples")
    n = len(singular)
    index = np.arange(1, n + 1)
    flat = np.sqrt(np.mean(singular**2))
    figure, axes = single_axes()
    few = n <= 60
    axes.plot(index, singular, "o" if few else "-", color=BLUE, ms=6, lw=2, label="class means, centred", zorder=3)
    axes.plot([0.5, n + 0.5], [flat, flat], "--", color=VERMILION, lw=1.8, label="simplex ETF of the same size")
    if few:
        axes.vlines(index, 0, singular, color=BLUE, lw=2, alpha=0.35)
    axes.set_xlim(0.5, n + 0.5)
    top = np.nanmax(np.append(singular, flat)) if np.isfinite(singular).any() else 1.0
    axes.set_ylim(0, 1.18 * top if top > 0 else 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("index")
    axes.set_ylabel("singular value")
    rank = float(effective_rank_of_values(torch.from_numpy(singular.copy())))
    axes.set_title(title if title is not None else f"Spectrum: effective rank {rank:.1f} of {n}")
    axes.legend(loc="upper right", ncols=2, frameon=False)
    return figure


def variability_by_size(
    variances: Numbers, counts: Numbers, class_names: Sequence[str] | None = None, *, title: str | None = None
) -> Figure:
    """Each class's variance against its number of training images, on a logarithmic axis.

    Variances are on a logarithmic axis too if they span more than a factor of 20. Classes of variance zero, as one with a single sample
    has by necessity, are hollow and sit on the lower edge. Up to 20 classes are all named,
    of more the three most and the three least variable.

    Args:
        variances: `[K]`, such as `Moments.variances`; NaN is left out.
        counts: `[K]`, training images per class.
        class_names: `[K]`; the labels as numbers by default.
        title: over the picture.

    Returns:
        A figure whose first collection holds the points `(count, variance)`.

    Raises:
        ValueError: lengths that differ.
    """
    y, x, names, shown = class_sizes(variances, counts, class_names, "variances")
    positive = shown[y[shown] > 0]
    zero = shown[y[shown] <= 0]

    figure, axes = single_axes()
    axes.scatter(x[positive], y[positive], s=46 if len(shown) <= 100 else 16, color=BLUE, alpha=0.85, lw=0, zorder=3)
    size_axis(axes, x[shown])
    if len(positive) and y[positive].max() > 20 * y[positive].min():
        axes.set_yscale("log")
        low, high = y[positive].min(), y[positive].max()
        axes.set_ylim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
    elif len(positive):
        axes.set_ylim(0, 1.15 * y[positive].max())
    if len(zero):
        where = axes.get_xaxis_transform()
        edge = np.full(len(zero), 0.012)
        axes.scatter(x[zero], edge, s=40, facecolors="none", edgecolors=VERMILION, transform=where, zorder=4)
        axes.text(0.99, 0.96, "hollow: variance 0", transform=axes.transAxes, ha="right", fontsize=9, color=VERMILION)
    by_variance = positive[np.argsort(y[positive])]
    named = by_variance if len(positive) <= 20 else np.concatenate([by_variance[:3], by_variance[-3:]])
    name_points(figure, axes, x[named], y[named], [short(names[k]) for k in named])
    axes.set_ylabel("variance of the class")
    axes.set_title(title if title is not None else "Variability within a class against its size")
    return figure
