"""What the pictures share: colours, axes, readable class names, and writing to files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
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

# Okabe & Ito's colours, which people with any common colour vision can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
GREY = "#767676"
DPI = 120  # of most figures


def render(figure: Figure) -> Image.Image:
    """Draw a figure's pixels.

    Args:
        figure: Any figure of matplotlib; it is drawn at its own `dpi`.

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
        picture: The figure or its pixels.
        path: The file; its suffix says the format.
    """
    if isinstance(picture, Figure) and Path(path).suffix == ".png":
        picture = render(picture)  # savefig would draw it twice, once to place its parts
    with replacing(path) as partial:
        picture.savefig(partial) if isinstance(picture, Figure) else picture.save(partial)


def single_axes(height: float = 4.8) -> tuple[Figure, Axes]:
    """A figure of this height in inches with one set of axes."""
    figure = Figure(figsize=(7, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def tidy(axes: Axes) -> None:
    """Give axes a light grid and no frame."""
    axes.grid(True, color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def as_array(values: Numbers) -> Array:
    """The values as float64 in host memory."""
    array = values.detach().to("cpu", torch.float64).numpy() if isinstance(values, Tensor) else values
    return np.asarray(array, dtype=np.float64)


def names_or_numbers(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """The class names, or the labels as numbers where there are no names."""
    return [str(k) for k in range(num_classes)] if class_names is None else list(class_names)


def plottable_classes(
    values: Numbers, counts: Numbers, class_names: Sequence[str] | None
) -> tuple[Array, Array, list[str], NDArray[np.int64]]:
    """The values and numbers of training images of all classes, their names, and the classes that can be shown."""
    y, x = as_array(values), as_array(counts)
    return y, x, names_or_numbers(class_names, len(x)), np.flatnonzero(np.isfinite(y) & (x > 0))


def points_by_size(counts: Array, values: Array) -> tuple[Figure, Axes]:
    """A figure with a point for each class, over its training images on a logarithmic axis."""
    figure, axes = single_axes()
    axes.scatter(counts, values, s=46 if len(counts) <= 100 else 16, color=BLUE, alpha=0.85, lw=0, zorder=3)
    axes.set(xscale="log", xlabel="training images of the class")
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    return figure, axes


def heat_map(
    cells: Array, names: Sequence[str], text: Callable[[float], str], white_above: float, **options: Any
) -> tuple[Figure, Axes, Colorbar]:
    """A heat map with a class on each row and column; NaN is grey. With up to 12 classes, cells hold their values.

    Args:
        cells: `[K, K]`.
        names: `[K]`.
        text: Makes the text of a cell from its value; it may be empty.
        white_above: The text is white on values of a larger magnitude.
        options: Options of `Axes.imshow`.
    """
    K = len(cells)
    size = 7.0 if K <= 40 else 8.5
    figure = Figure(figsize=(size, 0.88 * size), dpi=DPI if K <= 200 else 200, layout="compressed")
    axes = figure.add_subplot(facecolor="#d0d0d0")
    image = axes.imshow(cells, interpolation_stage="rgba", **options)
    name_ticks(axes, names)
    for (i, j), value in np.ndenumerate(cells) if K <= 12 else ():
        if written := text(value):
            colour = "white" if abs(value) > white_above else "black"
            axes.text(j, i, written, ha="center", va="center", fontsize=9 if K <= 10 else 8, color=colour)
    return figure, axes, figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Put class names on both axes; of more than 50, about 20 are shown."""
    at = np.arange(0, len(names), 1 if len(names) <= 50 else -(-len(names) // 20))
    labels = [short(names[i]) for i in at.tolist()]
    size = 9 if len(at) <= 20 else 7
    axes.set_yticks(at, labels, fontsize=size)
    if max(map(len, labels), default=0) <= 2:
        axes.set_xticks(at, labels, fontsize=size)
    else:
        slope = 45 if len(at) <= 25 else 90
        axes.set_xticks(at, labels, fontsize=size, rotation=slope, rotation_mode="anchor", ha="right", va="center")


def short(name: str, most: int = 18) -> str:
    """The name cut to a length, with its dollars escaped: a bare dollar would start a formula."""
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def name_points(axes: Axes, x: Array, y: Array, names: Sequence[str]) -> None:
    """Write names to the right of points, which are sorted by y; a name that would cover earlier ones moves above them."""
    axes.autoscale_view()
    at = axes.transAxes.inverted().transform(axes.transData.transform(np.column_stack([x, y])))
    line, letter = 0.038, 0.017  # the heights and widths of a line and a letter, as parts of the axes
    taken: list[tuple[float, float, float]] = []
    for (px, py), name in zip(at, map(short, names), strict=True):
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
