"""Files that a run left on disk, read whole or not at all."""

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from etflight.utils.errors import UserError


@contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """A `UserError` ends the block early, and its message is added to the problems."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: The file cannot be read, or is not whole.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError if it is no JSON, or no text
        raise UserError(f"{path} is not whole ({error})") from error


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, each with every column of the header.

    Raises:
        UserError: The file cannot be read, has a row of another length than the header, or does not end with a line's end.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            text = file.read()
        rows: list[dict[Any, Any]] = list(csv.DictReader(StringIO(text, newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:  # ValueError if it is no text
        raise UserError(f"{path} is not whole ({error})") from error
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path} is not whole (row {number} has another number of columns than the header)")
    if not text.endswith("\n"):
        raise UserError(f"{path} is not whole (it is empty, or its last row is cut off)")
    return rows


class ClassRow(NamedTuple):
    """What a test found of one class.

    Attributes:
        name: The name of the class.
        train_images: The number of its training images.
        acc: The accuracy on its test images, NaN without any.
    """

    name: str
    train_images: int
    acc: float


def read_classes(path: Path) -> list[ClassRow]:
    """The rows of a `per_class.csv`.

    Raises:
        UserError: The file cannot be read, or lacks a column or a number.
    """
    try:
        return [ClassRow(row["name"], int(row["train_images"]), float(row["acc"])) for row in read_table(path)]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not whole ({type(error).__name__}: {error})") from error


def series(path: Path, rows: list[dict[str, str]], name: str, over: str = "epoch") -> list[tuple[float, float]]:
    """A metric over epochs or steps, where it was logged.

    Args:
        path: The table's file, for errors.
        rows: Its rows.
        name: The metric.
        over: "epoch" or "step".

    Returns:
        Pairs of epoch or step and value, the value perhaps NaN; empty for a metric that was never logged.

    Raises:
        UserError: A value is not a number.
    """
    try:
        return [(float(row[over]), float(row[name])) for row in rows if row.get(name) and row.get(over)]
    except ValueError as error:
        raise UserError(f"{path} is not whole ({name}: {error})") from error


def finite(value: object) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)
