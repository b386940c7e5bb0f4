"""Arrays that a run has left on disk, read completely or not at all; and an even choice of positions."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etflight.utils.errors import UserError, brief
from etflight.utils.limits import refuse_growth


def evenly(length: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the positions 0 … length - 1, evenly spread, the first and the last among them."""
    return np.linspace(0, length - 1, min(length, most)).round().astype(np.int64)


def read_arrays(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Read arrays of numbers from an `.npz` file.

    Args:
        path: The file.
        names: The arrays to read.

    Raises:
        UserError: The file is missing or damaged, lacks an array, holds something other than numbers, or would fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            refuse_growth(str(path), sum(part.file_size for part in archive.infolist()), path.stat().st_size)
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in names}
    except Exception as error:  # a damaged file can cause any of them
        raise UserError(f"{path} is not whole ({brief(error)})") from error
    if any(array.dtype.kind not in "iuf" for array in arrays.values()):
        raise UserError(f"{path} is not whole (it holds something other than numbers)")
    return arrays
