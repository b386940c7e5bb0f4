"""What a trained classifier computes for every image of a split, kept in host memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from etflight.analysis.sweep import evaluation_batches
from etflight.classifier import Classifier
from etflight.data.base import ImageDataModule
from etflight.data.sources import Split
from etflight.utils.errors import UserError
from etflight.utils.modes import evaluation_mode
from etflight.utils.ranks import gather_objects

_AT_ONCE = 4096  # rows that go through the head together


class SplitFeatures(NamedTuple):
    """The backbone's features of the N images of a split, on the CPU.

    Attributes:
        features: The pooled features, `[N, d]`, float32 or float64.
        labels: The class indices `[N]`, int64.
    """

    features: Tensor
    labels: Tensor


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
    model: Classifier, data: ImageDataModule, split: Split, device: torch.device | None = None, *, quiet: bool = True
) -> SplitFeatures:
    """Run a classifier's backbone in evaluation mode over each image of a split once, in order and not augmented.

    All features that are kept of a split come from here. With several processes (`torch.distributed`), each computes its share, and all of
    them get all features.

    Args:
        model: The classifier; its modes are as before afterwards.
        data: The data module.
        split: The split.
        device: The device to compute on, to which the model is moved; None: where the model is.
        quiet: Whether to show no progress bar.

    Raises:
        UserError: Images cannot be read, or the backbone does not take their size.
    """
    model.to(device)
    batches = evaluation_batches(data, split, model.device, doing="" if quiet else "computing")
    with evaluation_mode(model):
        parts = [(model.features(images).cpu(), labels.cpu()) for images, labels in batches]
    return _over_ranks(SplitFeatures(*map(torch.cat, zip(*parts, strict=True))))


@torch.no_grad()
def outputs(
    model: Classifier, data: ImageDataModule, split: Split, device: torch.device | None = None, *, quiet: bool = True
) -> Outputs:
    """Let a classifier's head, in evaluation mode, go over the features of a split: see `split_features` for arguments and errors."""
    features, labels = split_features(model, data, split, device, quiet=quiet)
    embeddings, logits = [], []
    with evaluation_mode(model):
        for rows in torch.split(features, _AT_ONCE):
            embedding = model.head.embed(rows.to(model.device))
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
