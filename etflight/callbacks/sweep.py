"""What it takes to evaluate a model on its training images in the middle of a training, and leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from etflight.callbacks.embedding_source import frozen_modes
from etflight.data.sampler import ShardSampler
from etflight.errors import UserError
from etflight.metrics.statistics import INTEGERS
from etflight.ranks import broadcast_buffers, take_buffers_of_rank_zero


def every_sample_once(loader: DataLoader[Any], world_size: int, rank: int) -> DataLoader[Any]:
    """A loader of the same data set that gives each sample exactly once over all ranks, in order.

    Raises:
        UserError: an iterable data set on several ranks, which only its author can share out, or fewer samples than ranks.
    """
    if isinstance(loader.dataset, IterableDataset):
        if world_size > 1:
            raise UserError(
                f"NeuralCollapseMonitor cannot share the iterable data set {type(loader.dataset).__name__} among ranks: "
                "give train_dataloader with a data set that has a length"
            )
        return loader
    batch_size = loader.batch_size
    if batch_size is None and loader.batch_sampler is not None:  # a batch sampler of the user's own
        batch_size = getattr(loader.batch_sampler, "batch_size", None) or 256
    dataset: Any = loader.dataset
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=ShardSampler(dataset, world_size, rank),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
    )


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No gradient, but tensors that outlive Lightning's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def undisturbed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluate within the block and leave no trace: modes, buffers, random numbers and the trainer's stage come back."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING  # batch transforms of a data module ask whether it is training
    try:
        with (
            isolate_rng(include_cuda=trainer.strategy.root_device.type == "cuda"),
            frozen_modes(pl_module),
            _buffers_of_rank_zero(trainer, pl_module),
        ):
            yield
    finally:
        trainer.state.stage = stage


@contextmanager
def _buffers_of_rank_zero(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    if trainer.world_size == 1:
        yield
        return
    own = [(buffer, buffer.clone()) for buffer in broadcast_buffers(pl_module)]
    take_buffers_of_rank_zero(pl_module)
    try:
        yield
    finally:
        for buffer, value in own:
            buffer.copy_(value)


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """What Lightning's loops do with a batch, the data module's and the module's hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return trainer.precision_plugin.convert_input(batch)


def class_indices(batch: Any, kind: str) -> Tensor:
    """The labels of a batch `(inputs, labels, …)`.

    Args:
        batch: of a data loader.
        kind: "training" or such, for the message.

    Returns:
        `[B]` class indices, of an integer dtype.

    Raises:
        UserError: it is no such batch.
    """
    labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in INTEGERS:
        raise UserError(
            f"NeuralCollapseMonitor needs {kind} batches (inputs, labels) with class indices [B] as labels, "
            f"got {type(batch).__name__ if labels is None else labels!r:.60}"
        )
    return labels
