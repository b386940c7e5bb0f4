"""What the monitor gathers in one pass over a split: class statistics, and the embeddings that are needed after it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from etflight.callbacks.embedding_source import HEAD, Caught
from etflight.callbacks.sweep import plain_tensors
from etflight.metrics import ClassStatistics, Moments, measures

KEEP_BYTES = 2**30  # of embeddings in host memory, for `nc/train/nc4`


class PassStatistics:
    """The class statistics of one pass over a split: those of the head's features, and of each layer's.

    Args:
        num_classes: K.
        device: where the features are.
        anchors: `[K, d]` of some of the features, by name: class means of an earlier pass, which keep the sums small.
    """

    def __init__(self, num_classes: int, device: torch.device, anchors: Mapping[str, Tensor]) -> None:
        self.num_classes = num_classes
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.anchors = anchors
        self.statistics: dict[str, ClassStatistics] = {}

    def add(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch."""
        with plain_tensors():
            for name, values in features.items():
                if name not in self.statistics:
                    self.statistics[name] = self._new(name, values.shape[1])
                self.statistics[name].update(values.to(self.device), labels.to(self.device))

    def add_state(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Add what another pass over the same split has seen."""
        with plain_tensors():
            for name, values in state.items():
                if name not in self.statistics:
                    self.statistics[name] = self._new(name, values["anchor"].shape[1])
                self.statistics[name].merge_state(values)

    def _new(self, name: str, width: int) -> ClassStatistics:
        statistics = ClassStatistics(self.num_classes, width).to(self.device)
        anchors = self.anchors.get(name)
        if anchors is not None and anchors.shape == (self.num_classes, width):
            statistics.set_anchors(anchors)
        return statistics

    def compute(self) -> dict[str, Moments]:
        """Over all ranks, in the same order on each."""
        return {name: self.statistics[name].compute() for name in sorted(self.statistics)}


class KeptEmbeddings:
    """Embeddings of a sweep that are needed after it, in host memory.

    Args:
        rank: of this process.
        world_size: number of processes; rank r of W sees the samples r, r + W, r + 2W and so on.
        per_class: how many of each class `snapshot` gives, 0 for none.
    """

    def __init__(self, rank: int, world_size: int, per_class: int) -> None:
        self._rank, self._world_size, self._per_class = rank, world_size, per_class
        self._seen = 0
        self._chosen_of: dict[int, int] = {}
        self._chosen: list[tuple[int, int, Tensor]] = []
        self._bytes = 0
        self._parts: list[tuple[Tensor, Tensor]] | None = []
        self.without_decision = False

    def add(self, caught: Caught, labels: Tensor) -> None:
        """Keep a batch, unless there is no room or nothing to compare."""
        features = caught.features[HEAD]
        if caught.decision is None:
            self.without_decision = True
            self._parts = None
        if self._parts is not None:
            assert caught.decision is not None
            self._bytes += features.nbytes
            if self._bytes > KEEP_BYTES:
                self._parts = None
            else:
                self._parts.append((features.cpu(), caught.decision.cpu()))
        if self._per_class:
            for row, label in enumerate(labels.tolist()):
                if self._chosen_of.get(label, 0) < self._per_class:
                    self._chosen_of[label] = self._chosen_of.get(label, 0) + 1
                    index = (self._seen + row) * self._world_size + self._rank
                    self._chosen.append((index, label, features[row].half().cpu()))
        self._seen += len(labels)

    def agrees(self, moments: Moments) -> Tensor | None:
        """How many decisions agree with the nearest centre, of how many; None if embeddings were not kept."""
        if self._parts is None:
            return None
        agreeing = total = 0
        for features, decision in self._parts:
            nearest = measures.nearest_centre(features.to(moments.means.device), moments).cpu()
            agreeing += int((nearest == decision).sum())
            total += len(decision)
        return torch.tensor([agreeing, total], dtype=torch.float64)

    def snapshot(self) -> dict[str, Any]:
        """The first `per_class` embeddings of each class over all ranks, in the data's order; a collective call."""
        parts = [self._chosen]
        if self._world_size > 1:
            parts = [[] for _ in range(self._world_size)]
            dist.all_gather_object(parts, self._chosen)
        taken: dict[int, int] = {}
        rows = []
        for index, label, embedding in sorted((row for part in parts for row in part), key=lambda row: row[0]):
            taken[label] = taken.get(label, 0) + 1
            if taken[label] <= self._per_class:
                rows.append((index, label, embedding))
        return {
            "embeddings": torch.stack([embedding for _, _, embedding in rows]).numpy(),
            "labels": np.array([label for _, label, _ in rows], dtype=np.int64),
            "indices": np.array([index for index, _, _ in rows], dtype=np.int64),
        }
