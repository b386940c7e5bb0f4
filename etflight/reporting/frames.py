"""The collapse of a run over epochs as cosines that a page can draw: of bounded size, whatever the run's size."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etflight.utils.arrays import evenly, read_arrays
from etflight.utils.errors import UserError

Array = NDArray[Any]
_MOST_EPOCHS = 30
_MOST_CLASSES = 30
_MOST_POINTS = 400  # embeddings per epoch
_UNIT = 32767  # the int16 for a cosine of 1
_NONE = -32768  # the int16 for an undefined cosine


def frames(folder: Path) -> dict[str, Any] | None:
    """Cosines of class means, class vectors and embeddings at up to 30 epochs, of up to 30 classes.

    Args:
        folder: The run folder; its `gram/` has the matrices, its `snapshots/`, if any, the embeddings.

    Returns:
        None for a run without `gram/`, else `epochs` `[E]`, `classes` `[n]`, and cosines as base64 of int16, little-endian, 32767 for 1
        and -32768 for what is undefined: `heat` `[E, n, n]` of centred means (rows) and centred class vectors, `means` `[E, n, n]` of means
        (rows) and class vectors, `frame` `[E, n, n]` between class vectors. Where there are embeddings of the same images at all these
        epochs, also `points` `[E, N, n]` of embeddings (rows) and class vectors, and `labels` `[N]`, places in `classes`.

    Raises:
        UserError: A file is not whole; the message names it.
    """
    files = _by_epoch(folder / "gram")
    if not files:
        return None
    epochs = [sorted(files)[i] for i in evenly(len(files), _MOST_EPOCHS)]
    grams = [read_arrays(files[epoch], "classes", "gram") for epoch in epochs]
    classes: Array = grams[0]["classes"]
    n = len(classes)
    for epoch, content in zip(epochs, grams, strict=True):
        if content["gram"].shape != (2 * n + 1, 2 * n + 1) or not np.array_equal(content["classes"], classes):
            raise UserError(f"{files[epoch]} is not whole (its matrix has another size than that of the first epoch)")
    places = evenly(n, _MOST_CLASSES)
    matrices = np.stack([content["gram"].astype(np.float64) for content in grams])
    shown = np.concatenate([places, n + places])
    found = {
        "epochs": epochs,
        "classes": classes[places].tolist(),
        "heat": _pack(_cosines(_centred(matrices))[:, places[:, None], n + places]),
    }
    cosines = _cosines(matrices[:, shown[:, None], shown])
    m = len(places)
    found |= {"means": _pack(cosines[:, :m, m:]), "frame": _pack(cosines[:, m:, m:])}
    return found | _points(folder / "snapshots", epochs, classes[places])


def _points(folder: Path, epochs: Sequence[int], classes: Array) -> dict[str, Any]:
    files = _by_epoch(folder)
    if not set(epochs) <= files.keys():
        return {}
    shots = [read_arrays(files[epoch], "embeddings", "labels", "indices", "weight") for epoch in epochs]
    labels, indices = shots[0]["labels"], shots[0]["indices"]
    if not all(np.array_equal(shot["indices"], indices) for shot in shots):
        return {}
    each = max(1, min(20, _MOST_POINTS // len(classes)))
    rows = np.concatenate([np.flatnonzero(labels == k)[:each] for k in classes])
    projected = []
    for epoch, shot in zip(epochs, shots, strict=True):
        h, w = shot["embeddings"].astype(np.float64), shot["weight"].astype(np.float64)
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1] or len(h) != len(labels) or classes.max() >= len(w):
            raise UserError(f"{files[epoch]} is not whole (its arrays do not fit one another)")
        projected.append(_unit(h[rows]) @ _unit(w[classes]).T)
    places = {int(k): i for i, k in enumerate(classes)}
    return {"points": _pack(np.stack(projected)), "labels": [places[int(k)] for k in labels[rows]]}


def _centred(gram: Array) -> Array:
    """Inner products `[E, 2n, 2n]` of the vectors `μ_i - μ_G`, then `w_j - w̄`, with `w̄` over the n classes that there are."""
    n = gram.shape[1] // 2
    centring = np.eye(2 * n, 2 * n + 1)
    centring[:n, 2 * n] = -1
    centring[n:, n : 2 * n] -= 1 / n
    known = np.isfinite(gram)
    products = centring @ np.where(known, gram, 0) @ centring.T
    return np.where(known[:, : 2 * n, : 2 * n], products, np.nan)


def _cosines(gram: Array) -> Array:
    lengths = np.sqrt(np.maximum(np.einsum("eii->ei", gram), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(gram / (lengths[:, :, None] * lengths[:, None, :]))


def _unit(rows: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _pack(cosines: Array) -> str:
    whole = np.rint(np.nan_to_num(cosines, nan=0.0).clip(-1, 1) * _UNIT)
    packed = np.where(np.isfinite(cosines), whole, _NONE).astype("<i2")
    return base64.b64encode(packed.tobytes()).decode()


def _by_epoch(folder: Path) -> dict[int, Path]:
    named = ((re.fullmatch(r"epoch_(\d{3,9})\.npz", path.name), path) for path in folder.glob("epoch_*.npz"))
    return {int(match[1]): path for match, path in named if match}
