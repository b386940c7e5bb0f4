"""The run folder's `metrics.csv`, and loggers whose server may go away."""

import atexit
import csv
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import getattr_static
from pathlib import Path
from textwrap import shorten
from types import FunctionType
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from etflight.utils.errors import UserError, warn
from etflight.utils.files import flush_to_disk, replacing


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


# W&B itself would wait 90 seconds for its server at the start, and for ever at the end; what the user has set stays
_PATIENCE = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "120", "WANDB_FINISH_TIMEOUT_RAISES": "true"}


class Steadfast:
    """What a steadfast logger has beside its own class."""

    __slots__ = ()
    numbers: Path
    fell_silent = False


def steadfast(logger: Logger, numbers: Path) -> Logger:
    """Make a logger fall silent, with one warning line, where it would raise.

    Its logging methods do nothing from then on, and its `experiment` takes every call. A W&B run whose server cannot be reached at the
    start is kept on disk instead, for `wandb sync`; what its server has not taken at the end stays there, too.

    Args:
        logger: changed in place; it remains an instance of its class.
        numbers: where everything is written all the same, for the warning.

    Returns:
        The logger.
    """
    cls: Any = type(logger)
    members: dict[str, Any] = {"__module__": cls.__module__, "numbers": numbers}
    for name in dir(cls):
        member = getattr_static(cls, name)
        if isinstance(member, FunctionType) and _writes(name):
            members[name] = _guarded(member)
        elif isinstance(member, property) and name == "experiment":
            members[name] = property(_guarded_experiment(member))
    logger.__class__ = type(cls.__name__, (cls, Steadfast), members)
    return logger


@contextmanager
def may_fall_silent(logger: Logger) -> Iterator[None]:
    """A block in which a steadfast logger's errors silence it, and those of any other logger are raised.

    Args:
        logger: whose `experiment` is used in the block.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # servers and their clients raise all kinds
        if not isinstance(logger, Steadfast):
            raise
        if not logger.fell_silent:
            logger.fell_silent = True
            warn(
                f"{type(logger).__name__} fell silent ({_short(error)}): this run goes on without it, "
                f"all numbers are in {logger.numbers}"
            )


class Silence:
    """The experiment of a logger that fell silent: whatever is asked of it, it gives itself."""

    def __getattr__(self, name: str) -> "Silence":
        """Give itself."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> "Silence":
        """Do nothing."""
        return self

    def __getitem__(self, _: Any) -> "Silence":
        """Give itself."""
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        """Keep nothing."""


def _writes(name: str) -> bool:
    return name.startswith("log_") or name in ("save", "finalize", "after_save_checkpoint")


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.fell_silent:
            with may_fall_silent(self):
                return method(self, *args, **kwargs)
        return None

    return write


def _guarded_experiment(member: property) -> Callable[[Any], Any]:
    def experiment(self: Any) -> Any:
        if not self.fell_silent:
            with may_fall_silent(self):
                return _wandb_run(self, member) if isinstance(self, WandbLogger) else member.__get__(self)
        return Silence()

    return experiment


def _wandb_run(logger: Any, member: property) -> Any:
    """The logger's W&B run, kept on disk if the server does not answer when it is started."""
    if getattr(rank_zero_only, "rank", 0) != 0 or logger._experiment is not None:
        return member.__get__(logger)
    import wandb

    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    if logger.save_dir is not None:  # wandb would take a temporary folder instead of one that is missing
        Path(logger.save_dir).mkdir(parents=True, exist_ok=True)
    try:
        run = member.__get__(logger)
    except wandb.errors.UsageError as error:
        raise UserError(f"W&B cannot start ({_short(error)}): run wandb login, or set WANDB_MODE=offline") from error
    except wandb.errors.CommError as error:
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # it reads the environment when it starts
        run = member.__get__(logger)
        warn(
            f"W&B's server cannot be reached ({_short(error)}): this run is kept on disk, all numbers are in {logger.numbers}; "
            f"upload it later: wandb sync {run.settings.sync_dir}"
        )
    atexit.register(_finish_wandb, run)
    return run


def _finish_wandb(run: Any) -> None:
    """Wait for the server, but not for ever."""
    try:
        run.finish()
    except Exception as error:
        warn(
            f"W&B's server has not taken everything ({_short(error)}): upload the rest: wandb sync {run.settings.sync_dir}"
        )


def _short(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": "), 200, placeholder=" …")
