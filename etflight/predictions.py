"""The file that `etflight predict` writes: CSV, Parquet or NumPy's `.npz`, by its ending."""

import csv
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etflight.errors import UserError
from etflight.files import replacing
from etflight.terminal import readable

SUFFIXES = (".csv", ".parquet", ".npz")


class Predictions(NamedTuple):
    """Decisions on N images, the k most probable classes of each.

    Attributes:
        images: N paths, or positions.
        labels: int64 `[N, k]`, most probable first.
        probabilities: float32 `[N, k]`, calibrated.
        embeddings: float32 `[N, d']`, or None.
    """

    images: Sequence[str]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    embeddings: NDArray[np.float32] | None


def skipped_beside(path: Path) -> Path:
    """The file that lists what could not be read."""
    return path.with_name(f"{path.stem}_skipped.csv")


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        UserError: it, or the list of what was skipped, exists; another ending; Parquet without its package.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"--output {path}: give a name that ends in {', '.join(SUFFIXES)}")
    for file in (path, skipped_beside(path)):
        if os.path.lexists(file):
            raise UserError(f"--output {path}: {file} exists already and stays as it is: give another name")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"--output {path} needs pyarrow: pip install 'etflight[parquet]', or give .csv or .npz")


def write(path: Path, predictions: Predictions, names: Sequence[str]) -> None:
    """Write the file whole or not at all.

    CSV and Parquet have the columns `image`, `class`, `probability`, then `class_2`, `probability_2` … up to k, and the embedding, as
    `embedding_0` … in CSV and as one list in Parquet. `.npz` has the arrays `image` `[N]`, `label`, `class` and `probability` `[N, k]`
    and `embedding` `[N, d']`.

    Args:
        path: with one of the endings `SUFFIXES`.
        predictions: its rows.
        names: of the K classes.
    """
    classes = np.array(names)[predictions.labels]
    with replacing(path) as partial:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {"image": np.array(predictions.images, dtype=np.str_), "label": predictions.labels}
            arrays |= {"class": classes, "probability": predictions.probabilities}
            arrays |= {} if predictions.embeddings is None else {"embedding": predictions.embeddings}
            np.savez(partial, **arrays)
        elif path.suffix == ".parquet":
            _write_parquet(partial, predictions, classes)
        else:
            with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows(_rows(predictions, classes))


def _headings(k: int) -> list[str]:
    return [f"{name}{f'_{i}' if i > 1 else ''}" for i in range(1, k + 1) for name in ("class", "probability")]


def _rows(predictions: Predictions, classes: NDArray[np.str_]) -> Iterator[list[object]]:
    width = 0 if predictions.embeddings is None else predictions.embeddings.shape[1]
    yield ["image", *_headings(classes.shape[1]), *(f"embedding_{i}" for i in range(width))]
    for n, image in enumerate(predictions.images):
        pairs = zip(classes[n], predictions.probabilities[n], strict=True)
        numbers = [] if predictions.embeddings is None else predictions.embeddings[n].tolist()
        yield [image, *(cell for name, p in pairs for cell in (name, f"{p:.6f}")), *(f"{x:.7g}" for x in numbers)]


def _write_parquet(path: Path, predictions: Predictions, classes: NDArray[np.str_]) -> None:
    import pyarrow
    from pyarrow import parquet

    pairs = zip(classes.T, predictions.probabilities.T, strict=True)
    columns = [pyarrow.array(column) for pair in pairs for column in pair]
    table = {"image": pyarrow.array(map(readable, predictions.images), pyarrow.string())}
    table |= dict(zip(_headings(classes.shape[1]), columns, strict=True))
    if predictions.embeddings is not None:
        table["embedding"] = pyarrow.array(list(predictions.embeddings))
    parquet.write_table(pyarrow.table(table), path)
