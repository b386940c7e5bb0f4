"""Neural collapse of a trained model over splits of the data, without training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from etflight import plotting
from etflight.analysis.features import HEAD, Caught, EmbeddingSource
from etflight.analysis.sweep import PassStatistics, evaluation_batches, sweep
from etflight.data.base import ImageDataModule
from etflight.data.sources import Split
from etflight.metrics import Moments, measures
from etflight.utils.errors import UserError
from etflight.utils.modes import evaluation_mode

SPLITS: tuple[Split, ...] = ("train", "test")


class Collapse(NamedTuple):
    """Neural collapse of a model over splits.

    Attributes:
        measures: For each split the scalars of `etflight.metrics.measures.summary`, the accuracy `acc` and, but for the first split, `nc4`,
            for which the means of the first split are the centres.
        statistics: The class statistics of the embeddings of each split, on the CPU.
        class_vectors: The class vectors `[K, d']`, on the CPU.
    """

    measures: dict[str, dict[str, float]]
    statistics: dict[str, Moments]
    class_vectors: Tensor


def neural_collapse(
    model: nn.Module,
    data: ImageDataModule,
    *,
    head: str = "head",
    splits: Sequence[Split] = SPLITS,
    device: torch.device | None = None,
    quiet: bool = True,
) -> Collapse:
    """Measure a model in one pass over each split, each image once and not augmented.

    Args:
        model: An `etflight.Classifier`, or any model of images that ends in a linear layer; its modes are as before afterwards.
        data: The data module.
        head: The name of the submodule with the class vectors.
        splits: The splits, the one with the centres of `nc4` first.
        device: The device to compute on, to which the model is moved; None: where the model is.
        quiet: Whether to show no progress bar.

    Raises:
        UserError: The head has no class vectors, the model gives no logits, or images cannot be read.
    """
    source = EmbeddingSource(model.to(device), head)
    found: dict[str, dict[str, float]] = {}
    statistics: dict[str, Moments] = {}
    centres: Moments | None = None
    with evaluation_mode(model):
        for split in splits:
            statistics[split], found[split] = _measured(source, data, split, centres, quiet=quiet)
            centres = centres or statistics[split]
    return Collapse(found, statistics, source.weight.cpu())


def portraits(collapse: Collapse, data: ImageDataModule, class_names: Sequence[str] | None = None) -> dict[str, Figure]:
    """Draw each split: the figures of `etflight.plotting.portrait`, by the split and their name.

    Args:
        collapse: What `neural_collapse` returned.
        data: The data module.
        class_names: The names of the classes; None: those of the data.
    """
    names = class_names or data.class_names
    return {
        f"{split}_{name}": figure
        for split, moments in collapse.statistics.items()
        for name, figure in plotting.portrait(
            moments, collapse.class_vectors, counts=data.class_counts, class_names=names
        ).items()
    }


def _measured(
    source: EmbeddingSource, data: ImageDataModule, split: Split, centres: Moments | None, *, quiet: bool
) -> tuple[Moments, dict[str, float]]:
    device = source.weight.device
    passed = PassStatistics(source.num_classes, device)
    passed.centres = None if centres is None else measures.Centres.of(centres.to(passed.device))
    right = torch.zeros((), dtype=torch.long, device=device)

    def count(caught: Caught, labels: Tensor) -> None:
        if caught.decision is None:
            kind = type(source.model).__name__
            raise UserError(f"{kind} does not give one logit per class and image, so there is nothing to measure")
        right.add_((caught.decision == labels).sum())

    sweep(evaluation_batches(data, split, device, doing="" if quiet else "measuring"), source, passed, count)
    moments = passed.compute()[HEAD]
    scalars = measures.summary(moments, source.weight, source.bias)
    values = {"acc": float(right) / float(moments.counts.sum()), **{name: float(v) for name, v in scalars.items()}}
    if centres is not None:
        values["nc4"] = float(passed.agrees[0] / passed.agrees[1])
    return moments.to("cpu"), values
