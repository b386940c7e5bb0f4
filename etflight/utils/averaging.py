"""Averaged weights (EMA), as Lightning's `WeightAveraging` holds them beside those that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


def averaging_callbacks(trainer: Trainer) -> list[WeightAveraging]:
    """Those of the trainer, in their order."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning outside the class body
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


@contextmanager
def averaged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Inside, the module holds the averaged weights, as it does in a validation; the same ones where nothing is averaged."""
    callbacks = averaging_callbacks(trainer)
    for callback in callbacks:
        callback.on_validation_epoch_start(trainer, pl_module)
    try:
        yield
    finally:
        for callback in callbacks:
            callback.on_validation_epoch_end(trainer, pl_module)
