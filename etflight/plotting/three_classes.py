"""Three classes in the plane of their class vectors: a picture, and a film of many."""

from collections.abc import Sequence
from pathlib import Path

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
    chosen = _three(classes, len(weight))
    plane = _Plane(as_array(weight)[chosen])
    points, y = plane.project(as_array(embeddings)), as_array(labels)
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
    axes.set_axis_off()
    axes.set_title("" if epoch is None else f"epoch {epoch}", fontsize=14)
    return figure


class _Plane:
    """The plane through three points: its origin is their centre, its second axis points to the first of them."""

    def __init__(self, vectors: Array) -> None:
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


def _three(classes: Sequence[int], num_classes: int) -> list[int]:
    chosen = [int(k) for k in classes]
    if len(set(chosen)) != 3 or len(chosen) != 3 or not all(0 <= k < num_classes for k in chosen):
        raise ValueError(f"classes must be three different labels from 0 to {num_classes - 1}, got {chosen}")
    return chosen


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
    frame_ms: int = 150,
    last_ms: int = 2000,
) -> None:
    """Write the triangle view of every snapshot as an animated GIF, all frames to one scale and in one plane.

    The plane is that of the last snapshot's class vectors, which for a fixed frame are those of every epoch.

    Args:
        snapshot_files: `.npz` files with `embeddings` `[n, d]`, `labels` `[n]`, `epoch` and `weight` `[K, d]`, in the order of the film.
        classes: Three different labels.
        path: The GIF.
        class_names: `[K]`; the labels as numbers by default.
        frame_ms: Milliseconds that a frame stays.
        last_ms: Milliseconds that the last frame stays.

    Raises:
        ValueError: There is no file, or the classes are not three different ones.
        UserError: A file is no snapshot; the message names it.
    """
    if not snapshot_files:
        raise ValueError("there are no snapshots to film")
    shots = [read_arrays(Path(file), "embeddings", "labels", "epoch", "weight") for file in snapshot_files]
    weight = shots[-1]["weight"]
    chosen = _three(classes, len(weight))
    plane = _Plane(as_array(weight)[chosen])
    extent = max(
        _extent(plane, plane.project(as_array(shot["embeddings"])[np.isin(shot["labels"], chosen)])) for shot in shots
    )
    frames = []
    for shot in shots:
        points, labels, epoch = shot["embeddings"], shot["labels"], int(shot["epoch"])
        figure = triangle(points, labels, weight, chosen, epoch, class_names=class_names, extent=extent)
        figure.set_dpi(80)
        frames.append(render(figure).quantize(64, dither=Image.Dither.NONE))
    times = [frame_ms] * (len(frames) - 1) + [last_ms]
    with replacing(path) as partial:
        frames[0].save(partial, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
