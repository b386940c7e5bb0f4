"""What the pictures share: colours, axes, names that can be read, and the way to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from etflight.utils.files import replacing

Array = NDArray[np.float64]
Matrix = Tensor | NDArray[Any]
Numbers = Tensor | NDArray[Any] | Sequence[float]

# Okabe & Ito's colours, told apart with every common colour vision.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
GREY = "#767676"
DPI = 120  # of figures in general


def render(figure: Figure) -> Image.Image:
    """The figure's pixels.

    Args:
        figure: any of matplotlib's; it is drawn at its own `dpi`.

    Returns:
        A PIL image of mode RGB.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels).convert("RGB")


def save(picture: Figure | Image.Image, path: str | Path) -> None:
    """Write a figure, or what `render` made of it, so that a reader sees the old picture or the new one, never half of it.

    Args:
        picture: the figure or its pixels.
        path: whose suffix says the format.
    """
    with replacing(path) as partial:
        picture.savefig(partial) if isinstance(picture, Figure) else picture.save(partial)


def single_axes() -> tuple[Figure, Axes]:
    """A figure with one set of axes."""
    figure = Figure(figsize=(7, 4.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def tidy(axes: Axes) -> None:
    """A light grid and no frame."""
    axes.grid(True, color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def as_array(values: Numbers) -> Array:
    """Float64, wherever the values are."""
    array = values.detach().to("cpu", torch.float64).numpy() if isinstance(values, Tensor) else values
    return np.asarray(array, dtype=np.float64)


def as_labels(values: Matrix | Sequence[int]) -> NDArray[np.int64]:
    """Int64, wherever the values are."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(array).astype(np.int64)


def class_sizes(
    values: Numbers, counts: Numbers, class_names: Sequence[str] | None, what: str
) -> tuple[Array, Array, list[str], NDArray[np.int64]]:
    """One value for each class and its number of training images, their names, and which of them can be shown.

    Raises:
        ValueError: lengths that differ.
    """
    y, x = as_array(values).reshape(-1), as_array(counts).reshape(-1)
    if len(x) != len(y):
        raise ValueError(f"{len(y)} {what} for {len(x)} class counts")
    names = [str(k) for k in range(len(x))] if class_names is None else list(class_names)
    return y, x, names, np.flatnonzero(np.isfinite(y) & (x > 0))


def size_axis(axes: Axes, counts: Array) -> None:
    """Make the x axis one of training images per class, logarithmic, wide enough for these counts."""
    axes.set_xscale("log")
    axes.set_xlabel("training images of the class")
    if len(counts):
        low, high = counts.min(), counts.max()
        margin = max((high / low) ** 0.08, 1.5)
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_formatter("{x:g}")
        if high / low < 100:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Class names on both axes, thinned until they can be read."""
    K = len(names)
    step = 1 if K <= 50 else next(s for s in (5, 10, 20, 50, 100, 200) if K / s <= 20)
    at = np.arange(0, K, step)
    labels = [short(names[i]) for i in at.tolist()]
    size = 9 if len(at) <= 20 else 7
    upright = max(map(len, labels), default=0) <= 2 or (step > 1 and max(map(len, labels)) <= 3)
    slope = 0 if upright else 45 if len(at) <= 25 else 90
    axes.set_xticks(at, labels, rotation=slope, ha="right" if slope == 45 else "center", fontsize=size)
    axes.set_yticks(at, labels, fontsize=size)
    if slope == 45:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")


def short(name: str, most: int = 18) -> str:
    """A name that leaves room for others, as it is: a dollar would start a formula."""
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def name_points(figure: Figure, axes: Axes, x: Array, y: Array, names: Sequence[str]) -> None:
    """Names to the right of points that come sorted by y, each pushed above the last one it would cover."""
    if len(x) == 0:
        return
    FigureCanvasAgg(figure)
    at = axes.transAxes.inverted().transform(axes.transData.transform(np.column_stack([x, y])))
    line, letter = 0.038, 0.017  # of the axes, for a line of text and a letter
    taken: list[tuple[float, float, float]] = []
    for (px, py), name in zip(at, names, strict=True):
        width = letter * len(name) + 0.02
        ty = py
        for left, right, height in sorted(taken, key=lambda box: box[2]):
            if left < px + width and px < right and abs(ty - height) < line:
                ty = height + line
        taken.append((px, px + width, ty))
        axes.annotate(
            name,
            (px, py),
            (px + 0.016, ty),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=9,
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6} if abs(ty - py) > 0.02 else None,
        )
