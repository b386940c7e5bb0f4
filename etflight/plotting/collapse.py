"""Pictures of neural collapse."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from etflight.errors import UserError
from etflight.files import replacing
from etflight.metrics import Moments, measures
from etflight.metrics.measures.centring import GlobalMean
from etflight.plotting.canvas import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    VERMILION,
    Array,
    Matrix,
    Numbers,
    as_array,
    as_labels,
    class_sizes,
    name_points,
    name_ticks,
    render,
    short,
    single_axes,
    size_axis,
    tidy,
)

__all__ = [
    "collapse_curves",
    "cosine_heatmap",
    "portrait",
    "spectrum",
    "triangle",
    "triangle_film",
    "variability_by_size",
]

_STYLES = ("-", "--", ":", "-.")
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


# The frame ----------------------------------------------------------------------------------------------------------


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
    axes.set_title(title if title is not None else f"Spectrum: effective rank {_effective_rank(singular):.1f} of {n}")
    axes.legend(loc="upper right", ncols=2, frameon=False)
    return figure


def _effective_rank(singular: Array) -> float:
    positive = singular[singular > 0]
    share = positive / positive.sum()
    return float(np.exp(-(share * np.log(share)).sum())) if len(positive) and np.isfinite(singular).all() else np.nan


# Over epochs --------------------------------------------------------------------------------------------------------


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


# Class by class -----------------------------------------------------------------------------------------------------


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


# Three classes ------------------------------------------------------------------------------------------------------


def triangle(
    embeddings: Matrix,
    labels: Matrix | Sequence[int],
    weight: Matrix,
    classes: Sequence[int],
    epoch: int | None = None,
    *,
    class_names: Sequence[str] | None = None,
    extent: float | None = None,
    title: str | None = None,
) -> Figure:
    """The embeddings of three classes in the plane through their three class vectors.

    The plane is spanned by the vectors' differences; the first class is at the top, the second left, the third right. With a fixed
    frame it is the same in every epoch. An embedding equal to a class vector lies on its corner; vectors of other classes of a simplex
    fall on the centre.

    Args:
        embeddings: `[N, d]`, what meets the class vectors.
        labels: `[N]`; samples of other classes are not drawn.
        weight: `[K, d]`, class vectors.
        classes: three different labels.
        epoch: goes into the title.
        class_names: `[K]`; the labels as numbers by default.
        extent: half the side of the picture, in units of the embedding; by default what holds corners and embeddings.
        title: over the picture; the epoch by default.

    Returns:
        A figure with a collection of points per class, then one with the corners.

    Raises:
        ValueError: not three different classes, or vectors that lie on one line.
    """
    chosen = _three(classes, len(as_array(weight)))
    plane = _Plane(as_array(weight)[chosen])
    points, y = plane.project(as_array(embeddings)), as_labels(labels)
    if len(points) != len(y):
        raise ValueError(f"{len(points)} embeddings for {len(y)} labels")
    figure = Figure(figsize=(5.6, 5.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    corners = plane.corners
    axes.fill(*corners.T, facecolor="#f4f4f4", edgecolor=GREY, lw=1.2, zorder=1)
    for corner in corners:
        axes.plot([0, corner[0]], [0, corner[1]], color="#d9d9d9", lw=1, zorder=1.5)
    for colour, marker, k in zip((BLUE, VERMILION, GREEN), "os^", chosen, strict=True):
        own = points[y == k]
        size, alpha = (9, 0.35) if len(own) > 300 else (20, 0.55) if len(own) > 30 else (36, 0.75)
        axes.scatter(own[:, 0], own[:, 1], s=size, marker=marker, color=colour, alpha=alpha, lw=0, zorder=3)
    axes.scatter(
        corners[:, 0], corners[:, 1], s=150, marker="*", facecolor="white", edgecolor="black", lw=1.2, zorder=4
    )
    half = extent if extent is not None else _extent(plane, points[np.isin(y, chosen)])
    for colour, k, corner in zip((BLUE, VERMILION, GREEN), chosen, corners, strict=True):
        name = str(k) if class_names is None else short(class_names[k])
        direction = corner / max(float(np.linalg.norm(corner)), 1e-12)
        axes.annotate(
            name,
            tuple(corner),
            (24 * direction[0], 19 * direction[1]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=12,
            fontweight="bold",
            color=colour,
            zorder=5,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
        )
    axes.set_xlim(-half, half)
    axes.set_ylim(plane.middle - half, plane.middle + half)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    heading = title if title is not None else ("" if epoch is None else f"epoch {epoch}")
    axes.set_title(heading, fontsize=14)
    return figure


class _Plane:
    """The plane through three points: its origin is their centre, its second axis points to the first of them."""

    def __init__(self, vectors: Array) -> None:
        self.origin = vectors.mean(0)
        up = vectors[0] - self.origin
        across = vectors[2] - vectors[1]
        up_norm = np.linalg.norm(up)
        up = up / up_norm if up_norm > 0 else up
        across = across - (across @ up) * up
        norm = np.linalg.norm(across)
        if not norm > 1e-6 * np.linalg.norm(vectors[2] - vectors[1]):
            raise ValueError("the three class vectors lie on one line: they span no plane")
        self.axes: Array = np.stack([across / norm, up])
        self.corners = self.project(vectors)
        self.middle = float(self.corners[:, 1].max() + self.corners[:, 1].min()) / 2  # of the picture, above the origin

    def project(self, points: Array) -> Array:
        """`[N, d]` to `[N, 2]`."""
        flat: Array = (points - self.origin) @ self.axes.T
        return flat


def _three(classes: Sequence[int], num_classes: int) -> list[int]:
    chosen = [int(k) for k in classes]
    if len(set(chosen)) != 3 or len(chosen) != 3 or not all(0 <= k < num_classes for k in chosen):
        raise ValueError(f"classes must be three different labels from 0 to {num_classes - 1}, got {chosen}")
    return chosen


def _extent(plane: _Plane, points: Array) -> float:
    """Half a side that holds the corners with their names and all but the farthest embeddings."""
    middle = np.array([0.0, plane.middle])
    reach = 1.3 * float(np.abs(plane.corners - middle).max())
    finite = points[np.isfinite(points).all(1)]
    if len(finite):
        reach = max(reach, 1.05 * float(np.quantile(np.abs(finite - middle).max(1), 0.995)))
    return reach


def triangle_film(
    snapshot_files: Sequence[str | Path],
    classes: Sequence[int],
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    frame_ms: int = 150,
    last_ms: int = 2000,
) -> None:
    """Write the triangle view of every snapshot as an animated GIF, all frames to one scale and in one plane.

    The plane is that of the last snapshot's class vectors, which for a fixed frame are those of every epoch.

    Args:
        snapshot_files: `.npz` files with `embeddings` `[n, d]`, `labels` `[n]`, `epoch` and `weight` `[K, d]`, in the order of the film.
        classes: three different labels.
        path: of the GIF.
        class_names: `[K]`; the labels as numbers by default.
        frame_ms: how long a frame stays, in milliseconds.
        last_ms: how long the last one does.

    Raises:
        ValueError: no file, or not three different classes.
        UserError: a file that is no snapshot; names it.
    """
    if not snapshot_files:
        raise ValueError("there are no snapshots to film")
    shots = [_read_snapshot(file) for file in snapshot_files]
    weight = shots[-1]["weight"]
    chosen = _three(classes, len(weight))
    plane = _Plane(as_array(weight)[chosen])
    extent = max(
        _extent(plane, plane.project(as_array(shot["embeddings"])[np.isin(shot["labels"], chosen)])) for shot in shots
    )
    frames = []
    for shot in shots:
        figure = triangle(
            shot["embeddings"],
            shot["labels"],
            weight,
            chosen,
            int(shot["epoch"]),
            class_names=class_names,
            extent=extent,
        )
        figure.set_dpi(80)
        frame = render(figure)
        frames.append(frame.quantize(64, dither=Image.Dither.NONE))
    times = [frame_ms] * (len(frames) - 1) + [last_ms]
    with replacing(path) as partial:
        frames[0].save(partial, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def _read_snapshot(file: str | Path) -> dict[str, NDArray[Any]]:
    needed = ("embeddings", "labels", "epoch", "weight")
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in needed}
    except (OSError, ValueError, KeyError, EOFError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is no snapshot of a run ({reason}): give the files of a run's folder snapshots"
        ) from error
