"""One pass over a split: each image once and not augmented, its features added up as class statistics."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from etflight.analysis.features import HEAD, Caught, EmbeddingSource
from etflight.data.base import ImageDataModule
from etflight.data.sampler import ShardSampler
from etflight.data.sources import Batch, Split
from etflight.metrics import ClassStatistics, Moments, measures
from etflight.metrics.statistics import INTEGERS
from etflight.utils.errors import UserError
from etflight.utils.modes import evaluation_mode
from etflight.utils.precision import with_float64
from etflight.utils.ranks import gather_objects
from etflight.utils.torch_private import broadcast_buffers
from etflight.utils.trainer import data_module, take_buffers_of_rank_zero

KEEP_BYTES = 2**30  # the most embeddings kept in host memory, for `nc/train/nc4`
OnBatch = Callable[[Caught, Tensor], None]


def evaluation_batches(
    data: ImageDataModule, split: Split, device: torch.device, doing: str = "", start: int = 0
) -> Iterator[Batch]:
    """The batches of a split, each image once over all ranks and not augmented, on a device.

    Args:
        data: The data module.
        split: The split.
        device: The device.
        doing: What a progress bar says is done with them; empty: there is none.
        start: The number of images of this rank to leave out.
    """
    loader = track(data.eval_dataloader(split, start), f"{doing} {split}", disable=not doing, transient=True)
    for images, labels in loader:
        yield data.eval_transform((images.to(device), labels.to(device)))


def every_sample_once(loader: DataLoader[Any], world_size: int, rank: int) -> DataLoader[Any]:
    """Make a loader of the same data set that gives each sample exactly once over all ranks, in order.

    Raises:
        UserError: The data set is iterable and there are several ranks, among which only its author can share it out; or there are fewer
            samples than ranks.
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
    """No gradients within the block, but tensors that stay usable after Lightning's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def undisturbed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluate within the block and leave no trace: modes, buffers, random numbers and the trainer's stage are restored."""
    was_training = trainer.training
    if was_training:  # the batch transforms of a data module look at it
        trainer.validating = True
    try:
        with (
            isolate_rng(include_cuda=trainer.strategy.root_device.type == "cuda"),
            evaluation_mode(pl_module),
            _buffers_of_rank_zero(trainer, pl_module),
        ):
            yield
    finally:
        if was_training:
            trainer.training = True


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
    """Move a batch to the device as Lightning's loops do, with the hooks of the data module and of the module."""
    batch = trainer.precision_plugin.convert_input(batch)
    data = data_module(trainer)
    owner = data if data is not None and is_overridden("on_before_batch_transfer", data) else pl_module
    batch = owner.on_before_batch_transfer(batch, 0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return trainer.precision_plugin.convert_input(batch)


def class_indices(batch: Any) -> Tensor:
    """Return the labels of a batch `(inputs, labels, …)`.

    Args:
        batch: A batch of a data loader.

    Returns:
        The class indices `[B]`, of an integer dtype.

    Raises:
        UserError: The batch has no such labels.
    """
    labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in INTEGERS:
        raise UserError(
            "batches must be (inputs, labels, …) with class indices [B] as labels, "
            f"got {type(batch).__name__ if labels is None else labels!r:.60}"
        )
    return labels


class PassStatistics:
    """The class statistics of one pass over a split, for the head's features and for each layer's.

    Args:
        num_classes: The number of classes K.
        device: The device of the features.
        anchors: Class means `[K, d]` of an earlier pass by the name of the features, for any of them; they keep the sums small.
        scatter: Whether to collect the scatter, which NC1 needs in addition to the class means and variances.

    Attributes:
        centres: Class means, on the device, with the nearest of which the decisions are compared; None compares nothing.
        agrees: The numbers of decisions that agree with the nearest centre, and of all of them, float64 `[2]`.
    """

    def __init__(
        self, num_classes: int, device: torch.device, anchors: Mapping[str, Tensor] = {}, *, scatter: bool = True
    ) -> None:
        self.num_classes = num_classes
        self.scatter = scatter
        self.device = with_float64(device)
        self.anchors = anchors
        self.statistics: dict[str, ClassStatistics] = {}
        self.centres: measures.Centres | None = None
        self.agrees = torch.zeros(2, dtype=torch.float64, device=self.device)

    def add(self, caught: Caught, labels: Tensor) -> None:
        """Add a batch."""
        with plain_tensors():
            for name, values in caught.features.items():
                if name not in self.statistics:
                    self.statistics[name] = self._new(name, values.shape[1])
                self.statistics[name].update(values, labels)
            if self.centres is not None and caught.decision is not None:
                self.agrees += agreeing(caught.features[HEAD], caught.decision, self.centres)

    def add_state(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Add the states of another pass over the same split."""
        with plain_tensors():
            for name, values in state.items():
                if name not in self.statistics:
                    self.statistics[name] = self._new(name, values["anchor"].shape[1])
                self.statistics[name].merge_state(values)

    def _new(self, name: str, width: int) -> ClassStatistics:
        statistics = ClassStatistics(self.num_classes, width, scatter=self.scatter).to(self.device)
        anchors = self.anchors.get(name)
        if anchors is not None and anchors.shape == (self.num_classes, width):
            statistics.set_anchors(anchors)
        return statistics

    def compute(self) -> dict[str, Moments]:
        """Compute the statistics over all ranks, in the same order on each."""
        return {name: self.statistics[name].compute() for name in sorted(self.statistics)}


def agreeing(features: Tensor, decision: Tensor, centres: measures.Centres) -> Tensor:
    """Count the decisions `[B]` that agree with the centre nearest to the features `[B, d]`, and all of them.

    Returns:
        Float64 `[2]`; the first is NaN if a feature is not finite.
    """
    nearest = measures.nearest_centre(features.to(centres.means.device), centres)
    agree = (nearest == decision.to(nearest.device)).double()
    agree = torch.where(nearest < 0, math.nan, agree)
    return torch.stack([agree.sum(), torch.full_like(agree[0], len(agree))])


def sweep(
    batches: Iterable[Any],
    source: EmbeddingSource,
    passed: PassStatistics,
    on_batch: OnBatch | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run the source's model over batches, and add the features of its head and layers to the statistics.

    Args:
        batches: Batches `(inputs, labels, …)`, on the model's device and transformed.
        source: The source, of a model in evaluation mode.
        passed: The statistics to add to.
        on_batch: A function that is called with what was caught of each forward and the labels of its batch.
        forward_context: The context in which the model runs, such as a trainer's precision.
    """
    with plain_tensors(), source.attached():
        for batch in batches:
            labels = class_indices(batch)
            with forward_context():
                source.model(batch[0])
            caught = source.take(len(labels))
            passed.add(caught, labels)
            if on_batch is not None:
                on_batch(caught, labels)


def trainer_sweep(
    trainer: Trainer,
    pl_module: LightningModule,
    loader: Iterable[Any],
    source: EmbeddingSource,
    passed: PassStatistics,
    on_batch: OnBatch | None = None,
    limit: int | None = None,
) -> None:
    """Sweep over `limit` batches with a trainer's device, precision and batch transforms; leave no trace in trainer and model."""
    with plain_tensors(), undisturbed(trainer, pl_module):
        # the loader's iterator draws a random number, so it is made here
        batches = (to_device(trainer, pl_module, raw) for raw in islice(loader, limit))
        sweep(batches, source, passed, on_batch, trainer.precision_plugin.forward_context)


class KeptEmbeddings:
    """Embeddings and decisions of a sweep that are needed after it, in host memory.

    Args:
        rank: The rank of this process.
        world_size: The number of processes W; rank r sees the samples r, r + W, r + 2W and so on.
        per_class: The number of embeddings of each class that `snapshot` returns; 0 for none.
    """

    def __init__(self, rank: int, world_size: int, per_class: int) -> None:
        self._rank, self._world_size, self._per_class = rank, world_size, per_class
        self._seen = 0
        self._chosen_of: Counter[int] = Counter()
        self._chosen: list[tuple[int, int, Tensor]] = []
        self._bytes = 0
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, caught: Caught, labels: Tensor) -> None:
        """Keep a batch, unless memory is short or there is no decision to compare."""
        features = caught.features[HEAD]
        self._bytes += features.nbytes
        if self._bytes > KEEP_BYTES:
            self._parts.clear()
        elif caught.decision is not None:
            self._parts.append((features.cpu(), caught.decision.cpu()))
        for row, label in enumerate(labels.tolist() if self._per_class else []):
            self._chosen_of[label] += 1
            if self._chosen_of[label] <= self._per_class:
                index = (self._seen + row) * self._world_size + self._rank
                self._chosen.append((index, label, features[row].half().cpu()))
        self._seen += len(labels)

    def agrees(self, moments: Moments) -> Tensor:
        """Count the decisions that agree with the nearest class mean, and all of them, float64 `[2]`; NaN if not all were kept."""
        centres = measures.Centres.of(moments)
        counts = [agreeing(features, decision, centres) for features, decision in self._parts]
        total = torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.float64)
        return total.cpu() if total[1] == self._seen else torch.full((2,), math.nan, dtype=torch.float64)

    def snapshot(self, trainer: Trainer) -> dict[str, Any]:
        """Return the first `per_class` embeddings of each class over all ranks, in the data's order; a collective call."""
        taken: Counter[int] = Counter()
        rows = []
        for row in sorted((row for part in gather_objects(self._chosen) for row in part), key=itemgetter(0)):
            taken[row[1]] += 1
            if taken[row[1]] <= self._per_class:
                rows.append(row)
        indices, labels, embeddings = zip(*rows, strict=True)
        return {"embeddings": torch.stack(embeddings).numpy(), "labels": np.array(labels), "indices": np.array(indices)}
