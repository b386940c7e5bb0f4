"""What a trained classifier computes for every image of a split, kept in host memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from etflight.analysis.store import (
    Precision,
    SplitFeatures,
    facts_of,
    read_features,
    store_of,
    write_features,
)
from etflight.analysis.sweep import evaluation_batches
from etflight.classifier import Classifier
from etflight.data.base import ImageDataModule
from etflight.data.sources import Batch, Split
from etflight.network import Network
from etflight.utils.errors import UserError
from etflight.utils.modes import evaluation_mode
from etflight.utils.precision import at_least_float32
from etflight.utils.ranks import gather_objects

_AT_ONCE = 4096  # rows that go through the head together


class Outputs(NamedTuple):
    """What a classifier computes for the N images of a split, on the CPU.

    Attributes:
        features: The pooled features of the backbone, `[N, d]`, float32 or float64.
        embedding: What the head compares with its class vectors, `[N, d']`.
        logits: `[N, K]`, neither adjusted nor divided by a temperature.
        labels: The class indices `[N]`, int64.
    """

    features: Tensor
    embedding: Tensor
    logits: Tensor
    labels: Tensor


@torch.no_grad()
def split_features(
    model: Network,
    data: ImageDataModule,
    split: Split,
    device: torch.device | None = None,
    *,
    folder: Path | None = None,
    precision: Precision = "float32",
    quiet: bool = True,
) -> SplitFeatures:
    """Run a model's backbone in evaluation mode over each image of a split once, in order and not augmented.

    All features that are kept of a split come from here. With several processes (`torch.distributed`), each computes its share, and all of
    them get all features.

    Args:
        model: The model; its modes are as before afterwards.
        data: The data module.
        split: The split.
        device: The device to compute on, to which the model is moved; None: where the model is.
        folder: A folder of stores, which all processes see. Features are read there if the same backbone has computed them of the same
            images before, and else computed and written there; an interrupted pass goes on. None: they are computed and kept in memory.
        precision: In a folder, the precision of what is stored; with "bfloat16" the backbone also computes under autocast.
        quiet: Whether to show no progress bar.

    Raises:
        UserError: Images cannot be read, the backbone does not take their size, or the folder has other features.
    """
    if folder is None:
        parts = [
            (features.cpu(), labels.cpu())
            for features, labels in _computed(model, data, split, device, "float32", quiet=quiet)
        ]
        return _over_ranks(SplitFeatures(*map(torch.cat, zip(*parts, strict=True))))
    file, labels = store_of(folder, split), data.split(split).labels
    facts = facts_of(model, data, split, precision)
    if gather_objects(file.exists())[0]:  # all processes do the same
        return read_features(file, facts, labels)

    def rows(start: int) -> Iterator[Tensor]:
        batches = _computed(model, data, split, device, precision, start=start, quiet=quiet)
        return (features.cpu() for features, _ in batches)

    return write_features(file, facts, labels, rows, describe=f"{split} of {data}")


def with_stored_features(
    model: Network,
    data: ImageDataModule,
    splits: Iterable[Split],
    folder: Path,
    device: torch.device | None = None,
    *,
    precision: Precision = "float32",
    quiet: bool = True,
) -> ImageDataModule:
    """A copy of a data module that gives, in place of the images of some splits, their features: see `split_features`."""
    found = {
        split: split_features(model, data, split, device, folder=folder, precision=precision, quiet=quiet).features
        for split in splits
    }
    return data.with_features(found)


def _computed(
    model: Network,
    data: ImageDataModule,
    split: Split,
    device: torch.device | None,
    precision: Precision,
    *,
    start: int = 0,
    quiet: bool,
) -> Iterator[Batch]:
    """The features of this rank's images but the first `start`, and their labels, batch by batch."""
    model.to(device)
    batches = evaluation_batches(
        data, split, model.device, doing="" if quiet else "extracting features of", start=start
    )
    with torch.no_grad(), evaluation_mode(model):
        for images, labels in batches:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                features = model.features(images)
            yield features, labels


@torch.no_grad()
def outputs(
    model: Classifier,
    data: ImageDataModule,
    split: Split,
    device: torch.device | None = None,
    *,
    folder: Path | None = None,
    quiet: bool = True,
) -> Outputs:
    """Let a classifier's head, in evaluation mode, go over the features of a split: see `split_features` for arguments and errors."""
    features, labels = split_features(model, data, split, device, folder=folder, quiet=quiet)
    embeddings, logits = [], []
    with evaluation_mode(model):
        for rows in torch.split(features, _AT_ONCE):
            embedding = model.head.embed(at_least_float32(rows.to(model.device)))
            embeddings.append(embedding.to("cpu", copy=True))  # it may be a view of its features
            logits.append(model.head.logits(embedding).cpu())
    return Outputs(features, torch.cat(embeddings), torch.cat(logits), labels)


def _over_ranks(own: SplitFeatures) -> SplitFeatures:
    """The features of all ranks in the order of the images, of which rank r of W has r, r + W, r + 2W and so on."""
    ranks = gather_objects(own)
    place = torch.cat([torch.arange(len(part.labels)) * len(ranks) + rank for rank, part in enumerate(ranks)])
    order = place.argsort()
    return SplitFeatures(*(torch.cat(values)[order] for values in zip(*ranks, strict=True)))


def class_vectors(model: Classifier, name: str = "the model") -> Tensor:
    """The class vectors `[K, d']` of a classifier, on the CPU.

    Args:
        model: The classifier.
        name: Its name, for the error.

    Raises:
        UserError: Its head has none.
    """
    weight = getattr(model.head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        head = type(model.head).__name__
        raise UserError(f"the head {head} of {name} has no class vectors weight [K, d]: give a model that has")
    vectors: Tensor = model.head.class_vectors
    return vectors.detach().cpu()
