"""The logger of a run folder's `metrics.csv`."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from etflight.files import flush_to_disk, replacing


class MetricsCSV(Logger):
    """`metrics.csv`: one row per call, a column per metric, continued when a run is resumed.

    Args:
        folder: the run folder.
        keep_rows: how many rows the file had when the checkpoint being resumed was saved; later ones are written again.

    Attributes:
        rows: how many rows the file has now.
    """

    def __init__(self, folder: Path, keep_rows: int = 0) -> None:
        super().__init__()
        self._path = folder / "metrics.csv"
        self._columns: list[str] = []
        self.rows = keep_rows
        self._opened = False

    @property
    def name(self) -> str:
        """Empty: the folder is the run's own."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a run has no version number."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Append one row."""
        if not self._opened:
            self._open()
        row = {"step": step, **{key: float(value) for key, value in metrics.items()}}
        new = sorted(row.keys() - set(self._columns))
        if new:
            self._rewrite([*self._columns, *new], self._read())
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self.rows += 1

    def flush(self) -> None:
        """Wait until the rows are on the disk, so that no checkpoint counts rows which a power cut could still take."""
        if self._path.is_file():
            flush_to_disk(self._path)

    def _open(self) -> None:
        kept = self._read()[: self.rows] if self.rows and self._path.is_file() else []
        self.rows = len(kept)
        self._rewrite(list(kept[0]) if kept else ["step", "epoch"], kept)
        self._opened = True

    def _read(self) -> list[dict[str, str]]:
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        with replacing(self._path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
