"""All outputs of a trained classifier over a split, kept in host memory."""

from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from etflight.analysis.sweep import evaluation_mode
from etflight.classifier import Classifier
from etflight.data.base import ImageDataModule, Split
from etflight.utils.ranks import gather_objects


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
def outputs(
    model: Classifier, data: ImageDataModule, split: Split, device: torch.device | None = None, *, quiet: bool = True
) -> Outputs:
    """Run a classifier in evaluation mode over each image of a split once, in order and not augmented.

    With several processes (`torch.distributed`), each computes its share, and all of them get all outputs.

    Args:
        model: The classifier; its modes are as before afterwards.
        data: The data module.
        split: The split.
        device: The device to compute on, to which the model is moved; None: where the model is.
        quiet: Whether to show no progress bar.

    Raises:
        UserError: Images cannot be read, or the backbone does not take their size.
    """
    device = model.device if device is None else device
    model.to(device)
    parts: list[Outputs] = []
    loader = track(data.eval_dataloader(split), description=f"computing {split}", disable=quiet, transient=True)
    with evaluation_mode(model):
        for images, labels in loader:
            images, labels = data.eval_transform((images.to(device), labels))
            features = model.features(images)
            part = features, model.head.embed(features), model.head(features), labels
            # copies, since an embedding may be a view of its features
            parts.append(Outputs(*(values.to("cpu", copy=True) for values in part)))
    return _over_ranks(Outputs(*map(torch.cat, zip(*parts, strict=True))))


def _over_ranks(own: Outputs) -> Outputs:
    """The outputs of all ranks in the order of the images, of which rank r of W has r, r + W, r + 2W and so on."""
    ranks = gather_objects(own)
    place = torch.cat([torch.arange(len(part.labels)) * len(ranks) + rank for rank, part in enumerate(ranks)])
    order = place.argsort()
    return Outputs(*(torch.cat(values)[order] for values in zip(*ranks, strict=True)))
