"""What callbacks ask of a trainer; most of it Lightning sets outside the class body, where no type checker sees it."""

from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

from etflight.runs.loggers import MetricsCSV

_Kind = TypeVar("_Kind")


def data_module(trainer: Trainer) -> Any:
    """The data module, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]


def callbacks_of(trainer: Trainer, kind: type[_Kind]) -> list[_Kind]:
    """The trainer's callbacks of one kind, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def is_trial_run(trainer: Trainer) -> bool:
    """Whether this is Lightning's `fast_dev_run`, which leaves nothing on disk."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def shows_after(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the progress bar gets new numbers after this batch: one in `log_every_n_steps` does."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (batch_idx + 1) % every == 0


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps its files: the folder of its `metrics.csv`, or else the trainer's root."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            return Path(logger.save_dir)
    return Path(trainer.default_root_dir)
