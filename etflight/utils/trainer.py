"""What callbacks and the model ask of a trainer; Lightning sets most of it outside the class body, where no type checker sees it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from etflight.utils.errors import UserError, argument
from etflight.utils.lightning_private import swap_with_average
from etflight.utils.ranks import world
from etflight.utils.torch_private import broadcast_buffers

_Kind = TypeVar("_Kind")


class GivesBack(Callback):
    """A callback whose `teardown` gives back what it has taken, after an exception too, when Lightning does not call it."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tear down."""
        self.teardown(trainer, pl_module, "fit")


def data_module(trainer: Trainer) -> Any:
    """The trainer's data module, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]


def callbacks_of(trainer: Trainer, kind: type[_Kind]) -> list[_Kind]:
    """The trainer's callbacks of one kind, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def is_trial_run(trainer: Trainer) -> bool:
    """Whether this is Lightning's `fast_dev_run`, which leaves nothing on disk."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def shows_after(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the progress bar gets new numbers after this batch: every `log_every_n_steps` batches, and after the last."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and ((batch_idx + 1) % every == 0 or trainer.is_last_batch)


def choose_by_validation(trainer: Trainer) -> list[str]:
    """The names of what will stop a training, choose a checkpoint or lower the learning rate by a number of the validation images."""
    choosing: list[Any] = [*callbacks_of(trainer, EarlyStopping), *callbacks_of(trainer, ModelCheckpoint)]
    monitors = [(type(own).__name__, own.monitor) for own in choosing]
    schedule = getattr(trainer.lightning_module, "hparams", {}).get("lr_scheduler")
    plateau = ReduceLROnPlateau.__name__
    # torch's, or Lightning's
    if isinstance(schedule, Mapping) and schedule["class_path"].rpartition(".")[2] == plateau:
        monitors.append((plateau, schedule["init_args"].get("monitor", "val/loss")))
    return [name for name, monitor in monitors if re.search(r"(^|/)val[/_]", monitor or "")]


def refuse_if_never_reached(trainer: Trainer, epoch: int, what: str) -> None:
    """Refuse an epoch that this training does not reach.

    Args:
        trainer: The trainer, about to train; a trial run may end before the epoch.
        epoch: The epoch, counted from 0.
        what: The argument that gives it, with its value, for the error.

    Raises:
        UserError: The training has fewer epochs.
    """
    last = trainer.max_epochs
    if not is_trial_run(trainer) and last not in (None, -1) and epoch >= last:
        raise UserError(
            f"{what} is never reached in {last} epochs, counted from 0: give an earlier one, "
            f"or more {argument('trainer.max_epochs')}"
        )


@contextmanager
def averaged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let the module hold the averaged weights (EMA) within the block, as in a validation; nothing changes if nothing is averaged."""
    callbacks = callbacks_of(trainer, WeightAveraging)
    for callback in callbacks:
        swap_with_average(callback, pl_module)
    try:
        yield
    finally:
        for callback in callbacks:
            swap_with_average(callback, pl_module)


def take_buffers_of_rank_zero(module: nn.Module) -> None:
    """Overwrite the buffers that DDP keeps equal with those of rank 0; a collective call that does nothing on a single process.

    BatchNorm's running statistics differ from rank to rank, and DDP does not equalise them before each evaluation: not while
    gradients accumulate, and not when averaged weights have just been swapped in.
    """
    if world()[0] == 1:
        return
    for buffer in broadcast_buffers(module):
        dist.broadcast(buffer, src=0)
