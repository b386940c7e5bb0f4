"""Loggers whose server may go away: training goes on without them."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import getattr_static
from pathlib import Path
from textwrap import shorten
from types import FunctionType
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from etflight.errors import UserError, warn

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
