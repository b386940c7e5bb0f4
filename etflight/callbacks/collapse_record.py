"""What has been measured of neural collapse in a training: the history of its numbers, and the files in the run folder."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from etflight.runs.folder import run_folder
from etflight.utils.arrays import evenly
from etflight.utils.files import replacing

_MOST_CLASSES = 100  # the most classes of a Gram matrix on disk: 162 KB an epoch, whatever the width


class History:
    """The measured values over the epochs.

    Attributes:
        epochs: The number of finished epochs at each measurement, in ascending order.
        series: The values at `epochs` by log name, NaN if not measured.
        pending: Values by log name that have no epoch yet.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.series: dict[str, list[float]] = {}
        self.pending: dict[str, float] = {}

    def close(self, epoch: float) -> dict[str, float]:
        """Give the pending values their epoch, which may have some already, and return them; later epochs are forgotten.

        There are later ones if another training began, or one that was resumed from an earlier epoch.
        """
        values, self.pending = self.pending, {}
        while self.epochs and self.epochs[-1] > epoch:
            self.epochs.pop()
            for values_of_one in self.series.values():
                values_of_one.pop()
        if not self.epochs or self.epochs[-1] < epoch:
            self.epochs.append(epoch)
            for values_of_one in self.series.values():
                values_of_one.append(math.nan)
        for name, value in values.items():
            self.series.setdefault(name, [math.nan] * len(self.epochs))[-1] = value
        return values

    def log_outside_of_epochs(self, trainer: Trainer, at: float, *, epoch: int, step: int) -> None:
        """Log the pending values before the first step or after the last, when Lightning's own `log` cannot be used.

        Args:
            trainer: The trainer.
            at: The number of finished epochs.
            epoch: The index of the epoch in the loggers.
            step: The step in the loggers.
        """
        values = self.close(at)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": epoch}, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return a copy as plain data."""
        return {"epochs": list(self.epochs), "history": {name: list(series) for name, series in self.series.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.epochs = list(state_dict["epochs"])
        self.series = {name: list(series) for name, series in state_dict["history"].items()}


def share_over_ranks(trainer: Trainer, agrees: Tensor) -> float:
    """The share of agreeing decisions over all ranks, NaN if there are none.

    Args:
        trainer: The trainer.
        agrees: The numbers of agreeing decisions and of all, of this rank.
    """
    if trainer.world_size > 1:
        agrees = cast(Tensor, trainer.strategy.reduce(agrees.to(trainer.strategy.root_device), reduce_op="sum"))
    agreeing, total = agrees.tolist()
    return agreeing / total if total else math.nan


def write_gram(trainer: Trainer, epoch: int, means: Tensor, weight: Tensor) -> None:
    """Write `gram/epoch_XXX.npz`: the inner products of class means, class vectors and the mean of all class means.

    Args:
        trainer: The trainer, whose first process writes.
        epoch: The number of finished epochs.
        means: The class means `[K, d]`.
        weight: The class vectors `[K, d]`, on the CPU.
    """
    classes, means = torch.from_numpy(evenly(len(means), _MOST_CLASSES)), means.cpu()
    rows = torch.cat([means[classes], weight.double()[classes], means.nanmean(0, keepdim=True)])
    write_arrays(trainer, "gram", epoch, classes=classes.numpy(), gram=(rows @ rows.T).float().numpy())


def write_arrays(trainer: Trainer, folder: str, epoch: int, **content: Any) -> None:
    """Write `<folder>/epoch_XXX.npz` on the first process.

    Args:
        trainer: The trainer.
        folder: The folder within the run folder.
        epoch: The number of finished epochs.
        content: The arrays by name.
    """
    if not trainer.is_global_zero:
        return
    with replacing(run_folder(trainer) / folder / f"epoch_{epoch:03d}.npz") as partial:
        np.savez_compressed(partial, **content, epoch=np.int64(epoch))
