"""Batches of any data loader, checked before they go to the device, where a look at a label would wait for it."""

from typing import Any

from torch import Tensor

from etflight.utils.errors import UserError


def images_in(batch: Any) -> Any:
    """Return a batch of images, with or without labels, as it is.

    Raises:
        UserError: It is something else.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor):
        raise UserError(f"batches must be images, or (images, labels), got {_described(batch)}: change the data loader")
    return batch


def labelled(batch: Any, num_classes: int, *, training: bool) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch, labels of any integer dtype as int64.

    Args:
        batch: What a data loader gave.
        num_classes: The number of classes K.
        training: Whether it is trained on: then labels may be probabilities, and are not looked at if they are on a device already.

    Returns:
        The images as they are, and class indices int64 `[B]` or, for training, floating probabilities.

    Raises:
        UserError: The batch is something else, or a label names no class.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise UserError(f"batches must be (images, labels), got {_described(batch)}: change the data loader")
    images, labels = batch
    if labels.is_floating_point() and training:
        return images, labels
    if labels.is_floating_point() or labels.ndim != 1:
        several = labels.ndim == 2 and labels.shape[1] > 1
        mend = "labels.argmax(1) has them" if several else "one integer for each image"
        also = ", or for training probabilities [B, K], floating" if training else ""
        raise UserError(f"labels are {labels.dtype} {list(labels.shape)}: give class indices [B] ({mend}){also}")
    labels = labels.long()
    if len(labels) and (labels.device.type == "cpu" or not training):
        values = labels.cpu().numpy()
        for label in (values.min(), values.max()):
            if not 0 <= label < num_classes:
                raise UserError(
                    f"label {label} is none of {num_classes} classes: give labels from 0 to {num_classes - 1}"
                )
    return images, labels


def _described(batch: Any) -> str:
    """What a batch is, in a few words."""
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch[:4])}"
    return f"a {type(batch).__name__}"
