"""Tables of predictions: CSV, Parquet or NumPy's `.npz`, by their ending."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from etflight.utils.errors import UserError, argument
from etflight.utils.files import replacing, write_csv
from etflight.utils.terminal import readable

SUFFIXES = (".csv", ".parquet", ".npz")


def skipped_beside(path: Path) -> Path:
    """The path, beside the table, of the list of files that could not be read."""
    return path.with_name(f"{path.stem}_skipped.csv")


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        UserError: The file, or the list of skipped files beside it, exists; it has another ending; or Parquet's package is missing.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: give a name that ends in {', '.join(SUFFIXES)}")
    for file in (path, skipped_beside(path)):
        if os.path.lexists(file):
            raise UserError(f"{file} exists already and stays as it is: give another name with {argument('output')}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"{path} needs pyarrow: pip install 'etflight[parquet]', or give .csv or .npz")


def write(
    path: Path,
    images: Sequence[str],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    names: Sequence[str],
    embeddings: NDArray[np.float32] | None = None,
) -> None:
    """Write the file completely or not at all.

    CSV and Parquet have the columns `image`, `class`, `probability`, then `class_2`, `probability_2` … up to k, and the embedding:
    `embedding_0` … in CSV, one list in Parquet. `.npz` has the arrays `image` `[N]`, `label`, `class` and `probability` `[N, k]`
    and `embedding` `[N, d']`.

    Args:
        path: The file, with one of the endings `SUFFIXES`.
        images: The N paths, or positions.
        labels: The classes, `[N, k]`, most probable first.
        probabilities: Their calibrated probabilities, `[N, k]`.
        names: The names of the K classes.
        embeddings: The embeddings, `[N, d']`, or None.
    """
    classes = np.array(names)[labels]
    columns: dict[str, Any] = {}
    for k in range(labels.shape[1]):
        suffix = f"_{k + 1}" if k else ""
        columns |= {f"class{suffix}": classes[:, k], f"probability{suffix}": probabilities[:, k]}
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {"image": np.array(images, dtype=np.str_), "label": labels}
        arrays |= {"class": classes, "probability": probabilities}
        arrays |= {} if embeddings is None else {"embedding": embeddings}
        with replacing(path) as partial:
            np.savez(partial, **arrays)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns = {"image": list(map(readable, images)), **columns}
        columns |= {} if embeddings is None else {"embedding": list(embeddings)}
        with replacing(path) as partial:
            parquet.write_table(pyarrow.table(columns), partial)
    else:
        width = 0 if embeddings is None else embeddings.shape[1]
        columns |= {f"embedding_{i}": cast(Any, embeddings)[:, i] for i in range(width)}
        formats = [*["", ".6f"] * labels.shape[1], *[".7g"] * width]
        rows = zip(images, *columns.values(), strict=True)
        write_csv(path, ["image", *columns], ([image, *map(format, cells, formats)] for image, *cells in rows))
