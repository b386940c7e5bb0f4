"""Three classes in the plane of their class vectors: a picture, and a film of many."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from etflight.plotting.canvas import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    VERMILION,
    Array,
    Matrix,
    as_array,
    render,
    short,
)
from etflight.utils.arrays import read_arrays
from etflight.utils.files import replacing

_BOX = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
_NAME: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "fontsize": 12,
    "fontweight": "bold",
    "zorder": 5,
    "bbox": _BOX,
}


def triangle(
    embeddings: Matrix,
    labels: Matrix | Sequence[int],
    weight: Matrix,
    classes: Sequence[int],
    epoch: int | None = None,
    *,
    class_names: Sequence[str] | None = None,
    extent: float | None = None,
) -> Figure:
    """The embeddings of three classes in the plane through their three class vectors.

    The plane is spanned by the vectors' differences; the first class is at the top, the second left, the third right. With a fixed
    frame it is the same in every epoch. An embedding equal to a class vector lies on its corner; vectors of other classes of a simplex
    fall on the centre.

    Args:
        embeddings: `[N, d]`, which are compared with the class vectors.
        labels: `[N]`; samples of other classes are not drawn.
        weight: `[K, d]`, class vectors.
        classes: Three different labels.
        epoch: A number for the picture's title.
        class_names: `[K]`; the labels as numbers by default.
        extent: Half the side of the picture, in units of the embedding; by default it holds corners and embeddings.

    Returns:
        A figure with a collection of points per class, then one with the corners.

    Raises:
        ValueError: The classes are not three different ones, or their vectors lie on one line.
    """
    plane = _Plane(weight, classes)
    points, y_true = plane.project(as_array(embeddings)), as_array(labels)
    figure = Figure(figsize=(5.6, 5.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.fill(*plane.corners.T, facecolor="#f4f4f4", edgecolor=GREY, lw=1.2, zorder=1)
    for colour, marker, k, corner in zip((BLUE, VERMILION, GREEN), "os^", classes, plane.corners, strict=True):
        own = points[y_true == k]
        size, alpha = (9, 0.35) if len(own) > 300 else (20, 0.55) if len(own) > 30 else (36, 0.75)
        axes.plot([0, corner[0]], [0, corner[1]], color="#d9d9d9", lw=1, zorder=1.5)
        axes.scatter(own[:, 0], own[:, 1], s=size, marker=marker, color=colour, alpha=alpha, lw=0, zorder=3)
        name = str(k) if class_names is None else short(class_names[k])
        outwards = np.array([24, 19]) * corner / max(float(np.linalg.norm(corner)), 1e-12)
        axes.annotate(name, tuple(corner), tuple(outwards), textcoords="offset points", color=colour, **_NAME)
    x, y = plane.corners.T
    axes.scatter(x, y, s=150, marker="*", facecolor="white", edgecolor="black", lw=1.2, zorder=4)
    half = extent if extent is not None else _extent(plane, points[np.isin(y_true, classes)])
    axes.set(xlim=(-half, half), ylim=(plane.middle - half, plane.middle + half), aspect="equal")
    axes.set_axis_off()
    axes.set_title("" if epoch is None else f"epoch {epoch}", fontsize=14)
    return figure


class _Plane:
    """The plane through three class vectors: its origin is their centre, its second axis points to the first of them."""

    def __init__(self, weight: Matrix, classes: Sequence[int]) -> None:
        if len(classes) != 3 or len(set(classes) & set(range(len(weight)))) != 3:
            raise ValueError(f"classes must be three different labels from 0 to {len(weight) - 1}, got {classes}")
        vectors = as_array(weight)[list(classes)]
        self.origin = vectors.mean(0)
        sides = np.stack([vectors[0] - self.origin, vectors[2] - vectors[1]])  # up, and across
        if np.linalg.matrix_rank(sides, tol=1e-6 * np.linalg.norm(sides)) < 2:
            raise ValueError("the three class vectors lie on one line: they span no plane")
        Q, R = np.linalg.qr(sides.T)
        self.axes: Array = (Q * np.sign(np.diag(R))).T[::-1]
        self.corners = self.project(vectors)
        self.middle = float(self.corners[:, 1].max() + self.corners[:, 1].min()) / 2  # of the picture, above the origin

    def project(self, points: Array) -> Array:
        """`[N, d]` to `[N, 2]`."""
        flat: Array = (points - self.origin) @ self.axes.T
        return flat


def _extent(plane: _Plane, points: Array) -> float:
    """Half the side of a picture that holds the corners with their names and all but the farthest embeddings."""
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
) -> None:
    """Write the triangle view of every snapshot as an animated GIF, all frames to one scale and in one plane.

    The plane is that of the last snapshot's class vectors, which for a fixed frame are those of every epoch.

    Args:
        snapshot_files: `.npz` files with `embeddings` `[n, d]`, `labels` `[n]`, `epoch` and `weight` `[K, d]`, in the order of the film.
        classes: Three different labels.
        path: The GIF.
        class_names: `[K]`; the labels as numbers by default.

    Raises:
        ValueError: The classes are not three different ones.
        UserError: A file is no snapshot; the message names it.
    """
    shots = [read_arrays(Path(file), "embeddings", "labels", "epoch", "weight") for file in snapshot_files]
    weight = shots[-1]["weight"]
    plane = _Plane(weight, classes)
    own = (as_array(shot["embeddings"])[np.isin(shot["labels"], classes)] for shot in shots)
    extent = max(_extent(plane, plane.project(embeddings)) for embeddings in own)
    frames = []
    for shot in shots:
        points, labels, epoch = shot["embeddings"], shot["labels"], int(shot["epoch"])
        figure = triangle(points, labels, weight, classes, epoch, class_names=class_names, extent=extent)
        figure.set_dpi(80)
        frames.append(render(figure).quantize(64, dither=Image.Dither.NONE))
    times = [150] * (len(frames) - 1) + [2000]  # milliseconds
    with replacing(path) as partial:
        frames[0].save(partial, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
