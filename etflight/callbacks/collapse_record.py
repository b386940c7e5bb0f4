"""What has been measured of neural collapse in a training: the history of its numbers, and the files in the run folder."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from etflight.runs.loggers import run_folder
from etflight.utils.arrays import evenly
from etflight.utils.files import replacing

_MOST_CLASSES = 100  # the most classes of a Gram matrix on disk: 162 KB an epoch, whatever the width


class History:
    """The measured values over the epochs.

    Attributes:
        epochs: The number of finished epochs at each measurement, in ascending order.
        series: The values at `epochs` by log name, NaN if not measured.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.series: dict[str, list[float]] = {}

    def add(self, epoch: float, values: Mapping[str, float]) -> None:
        """Add the values of an epoch, perhaps to others of the same epoch; later epochs are forgotten.

        There are later ones if another training began, or one that was resumed from an earlier epoch.
        """
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

    def state_dict(self) -> dict[str, Any]:
        """Return a copy as plain data."""
        return {"epochs": list(self.epochs), "history": {name: list(series) for name, series in self.series.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.epochs = list(state_dict["epochs"])
        self.series = {name: list(series) for name, series in state_dict["history"].items()}


def write_gram(trainer: Trainer, epoch: int, means: Tensor, weight: Tensor) -> None:
    """Write `gram/epoch_XXX.npz`: the inner products of class means, class vectors and the mean of all class means.

    Args:
        trainer: The trainer, whose first process writes.
        epoch: The number of finished epochs.
        means: The class means `[K, d]`.
        weight: The class vectors `[K, d]`, on the CPU.
    """
    if not trainer.is_global_zero:
        return
    classes, means = torch.from_numpy(evenly(len(means), _MOST_CLASSES)), means.cpu()
    rows = torch.cat([means[classes], weight.double()[classes], means.nanmean(0, keepdim=True)])
    _write(trainer, "gram", epoch, classes=classes.numpy(), gram=(rows @ rows.T).float().numpy())


def write_snapshot(trainer: Trainer, folder: str, epoch: int, content: Mapping[str, Any], weight: Tensor) -> None:
    """Write `<folder>/epoch_XXX.npz`: embeddings and the class vectors that they are compared with.

    Args:
        trainer: The trainer, whose first process writes.
        folder: The folder within the run folder.
        epoch: The number of finished epochs.
        content: What `KeptEmbeddings.snapshot` gives.
        weight: The class vectors `[K, d]`, on the CPU.
    """
    if trainer.is_global_zero:
        _write(trainer, folder, epoch, **content, weight=weight.float().numpy())


def _write(trainer: Trainer, folder: str, epoch: int, **content: Any) -> None:
    with replacing(run_folder(trainer) / folder / f"epoch_{epoch:03d}.npz") as partial:
        np.savez_compressed(partial, **content, epoch=np.int64(epoch))
