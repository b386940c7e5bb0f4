"""The run folder's `metrics.csv`, and loggers whose server may go away."""

import csv
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from etflight.runs.folder import METRICS
from etflight.utils.errors import UserError, brief, is_of_dead_loader, warn
from etflight.utils.files import flush_to_disk, replacing


class MetricsCSV(Logger):
    """Writes `metrics.csv`: one row per call and one column per metric; a resumed run continues the file.

    Args:
        folder: The run folder.
        keep_rows: The number of rows that the file had when the checkpoint being resumed was saved; later ones are written again.

    Attributes:
        rows: The number of rows that the file has now.
    """

    def __init__(self, folder: Path, keep_rows: int = 0) -> None:
        super().__init__()
        self._path = folder / METRICS
        self._columns: list[str] = []
        self.rows = keep_rows

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
        """Do nothing: the hyper-parameters are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Append one row."""
        if not self._columns:
            self._open()
        row = {"step": step, **{key: float(value) for key, value in metrics.items()}}
        new = sorted(row.keys() - set(self._columns))
        if new:
            self._rewrite([*self._columns, *new], self._read())
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self.rows += 1

    def flush(self) -> None:
        """Wait until the rows are on the disk, so that a checkpoint never counts rows that a power cut could lose."""
        if self._path.is_file():
            flush_to_disk(self._path)

    def _open(self) -> None:
        kept = self._read()[: self.rows] if self.rows and self._path.is_file() else []
        self.rows = len(kept)
        self._rewrite(list(kept[0]) if kept else ["step", "epoch"], kept)

    def _read(self) -> list[dict[str, str]]:
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        with replacing(self._path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


class FailSafe:
    """A wrapper of a logger that falls silent, with one line of warning, instead of raising errors.

    It passes for an instance of the logger's class. Once it is silent, its logging methods do nothing and its `experiment` accepts every
    call.

    Args:
        logger: The wrapped logger.
        numbers: The place where all numbers are written in any case, for the warning.
        start: What returns the logger's `experiment` when it is asked for the first time; None: the logger itself.
    """

    def __init__(self, logger: Logger, numbers: Path, start: Callable[[], Any] | None = None) -> None:
        self._logger, self._numbers, self._start = logger, numbers, start
        self._is_silent = False

    @property  # type: ignore[misc]  # read-only
    def __class__(self) -> Any:
        """The class of the wrapped logger, for `isinstance`."""
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        """Return the wrapped logger's attribute; errors of its methods that log make this logger silent."""
        if name == "experiment" and hasattr(type(self._logger), name):
            found = self._call(self._started)
            return DummyLogger().experiment if found is None else found
        found = getattr(self._logger, name)
        writes = name.startswith("log_") or name in ("save", "finalize", "after_save_checkpoint")
        return partial(self._call, found) if writes and callable(found) else found

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_silent:
            with self.silenced_by_errors():
                return method(*args, **kwargs)
        return None

    @contextmanager
    def silenced_by_errors(self) -> Iterator[None]:
        """Silence the logger at an error within the block, unless it is a `UserError`, or that of a loader process that died meanwhile."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # servers and their clients raise all kinds
            if is_of_dead_loader(error):
                raise
            if not self._is_silent:
                self._is_silent = True
                warn(
                    f"{type(self._logger).__name__} fell silent ({brief(error)}): this run goes on without it, "
                    f"all numbers are in {self._numbers}"
                )

    def _started(self) -> Any:
        start, self._start = self._start, None
        return cast(Any, self._logger).experiment if start is None else start()


def may_fall_silent(logger: Logger) -> AbstractContextManager[None]:
    """A block that uses a logger's `experiment`: an error in it silences a `FailSafe` logger, and is raised for any other."""
    return logger.silenced_by_errors() if isinstance(logger, FailSafe) else nullcontext()
