"""The loaders of training and evaluation, which tell their images when a pass ends."""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from etflight.data.sampler import ImbalancedSampler
from etflight.data.sources import Batch, ImageSplit
from etflight.utils.errors import UserError


class EvalLoader(DataLoader[Batch]):
    """A DataLoader that tells its data set when a pass ends, and skips batches without an image.

    A pass ends before its last batch is used, because Lightning asks for no more, or when it is cut short.

    Raises:
        UserError: No batch has an image.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        data, is_empty = cast(ImageSplit, self.dataset), True
        try:
            for served, batch in enumerate(super().__iter__(), start=1):
                if served == len(self):
                    data.end_pass()
                if len(batch[1]):
                    is_empty = False
                    yield batch
        finally:
            data.end_pass()
        if is_empty:
            raise UserError(f"no image of a whole pass can be read, the first is {data.name(next(iter(self.sampler)))}")


class TrainLoader(DataLoader[Batch]):
    """A DataLoader whose place in the epoch is part of a checkpoint, through Lightning's `state_dict` protocol.

    `__iter__` is a generator because Lightning calls `iter()` before it tells the sampler the epoch: with workers, a
    plain DataLoader has by then fetched images of epoch 0. The sampler skips what was served, so nothing is decoded
    twice.

    Attributes:
        waited: Seconds that the consumer has waited for batches.
    """

    waited = 0.0
    trainer: Trainer | None = None
    _served = 0
    _resume_at = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._served, self._resume_at = self._resume_at, 0
        skips = isinstance(self.sampler, ImbalancedSampler) and self.batch_size is not None
        if skips:
            cast(Any, self.sampler).skip = self._served * cast(int, self.batch_size)
        start = time.perf_counter()
        try:
            # Lightning puts another sampler in its place under overfit_batches
            for batch in islice(super().__iter__(), 0 if skips else self._served, None):
                self.waited += time.perf_counter() - start
                self._served += 1
                if self._served == self._length:
                    cast(ImageSplit, self.dataset).end_pass()
                yield batch
                start = time.perf_counter()
        finally:
            cast(ImageSplit, self.dataset).end_pass()  # for a run that stops within an epoch

    def state_dict(self) -> dict[str, int]:
        """The number of batches served in this epoch; 0 once it is over, even if `limit_train_batches` cut it short."""
        return {"served": self._served % max(self._length, 1)}

    @property
    def _length(self) -> int:
        """The number of batches in an epoch."""
        return len(self) if self.trainer is None else min(len(self), int(self.trainer.num_training_batches))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch start after the batches that were served."""
        self._resume_at = state["served"]


def loader_options(num_workers: int, trainer: Trainer | None) -> dict[str, Any]:
    """The arguments that all loaders share; memory is pinned where batches may go to a GPU."""
    to_cuda = torch.cuda.is_available() if trainer is None else trainer.strategy.root_device.type == "cuda"
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": to_cuda,
        "collate_fn": _whole_batch,
    }


def _whole_batch(batch: Any) -> Any:
    """Return the batch, which `ImageSplit.__getitems__` has made; spawned workers need a named function."""
    return batch
