"""What a data set holds, without a model: its facts as plain data, and a contact sheet."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from etflight import plotting
from etflight.data.base import ImageDataModule
from etflight.data.profiles import positions_by_class
from etflight.data.sources import Split
from etflight.metrics.accuracy import by_frequency, shot_groups
from etflight.utils.arrays import evenly
from etflight.utils.errors import UserError

_MOST_CLASSES = 44  # on the contact sheet: two blocks of rows


def describe(data: ImageDataModule) -> dict[str, Any]:
    """The facts about a set's images, as plain data.

    Args:
        data: A data module, which is read as far as needed.

    Returns:
        `class`, `dataset`, `name`, `image_shape` `[C, H, W]`, `class_names`, `fingerprint`, `imbalance_ratio` and `count_ratio` of the
        training images (`data.ratios`), `validation`, `class_counts` (`[K]` each of `train`, `test` and, if it is held out, `val`) and
        `shot_groups` (the labels in each).
    """
    splits: list[Split] = ["train", "val", "test"] if data.val_is_held_out else ["train", "test"]
    counts = {name: np.bincount(data.split(name).labels.numpy(), minlength=data.num_classes) for name in splits}
    groups = shot_groups(torch.from_numpy(counts["train"]))
    return {
        "class": type(data).__name__,
        "dataset": data.dataset_name,
        "name": str(data),
        "image_shape": list(data.preprocessing.input_size),
        "class_names": data.class_names,
        "fingerprint": data.fingerprint,
        **data.ratios,
        "validation": data.validation,
        "class_counts": {name: own.tolist() for name, own in counts.items()},
        "shot_groups": {group: members.nonzero().flatten().tolist() for group, members in groups.items()},
    }


def contact_sheet(data: ImageDataModule, images_per_class: int = 8, *, augmented: bool = False) -> Any:
    """A contact sheet of training images, evenly chosen from each class.

    If there are many classes, it shows an even choice of them by size.

    Args:
        data: The data module.
        images_per_class: The most images of a class.
        augmented: Show them as a training step gets them, not as they are stored.

    Returns:
        The figure of `plotting.contact_sheet`.

    Raises:
        UserError: No image of the sheet can be read.
    """
    counts, split = data.class_counts, data.split("train")
    order = by_frequency(torch.from_numpy(counts)).numpy()
    shown = order[evenly(len(order), _MOST_CLASSES)]
    by_class = positions_by_class(split.labels.numpy(), len(counts))
    chosen = [by_class[k][evenly(counts[k], images_per_class)] for k in shown]
    # corrupt images are missing here, if they are to be skipped
    images, labels = split.__getitems__(np.concatenate(chosen).tolist())
    split.end_pass()
    if len(images) == 0:
        raise UserError(f"{data}: no image of the contact sheet can be read: replace the files")
    if augmented:
        images = _augmented(data, images, labels)
    row_of = np.zeros(len(order), np.int64)
    row_of[shown] = np.arange(len(shown))
    rows = torch.from_numpy(row_of)[labels]
    names = [data.class_names[k] for k in shown]
    part = "" if len(shown) == len(order) else f", {len(shown)} of {len(order)} classes"
    return plotting.contact_sheet(images, rows, names, counts[shown].tolist(), title=f"{data}{part}")


def _augmented(data: ImageDataModule, images: Tensor, labels: Tensor) -> Tensor:
    """Uint8 images as one training step gets them, before they are normalised."""
    changed, _ = data.train_transform((images, labels), step=0)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.preprocessing.mean, data.preprocessing.std))
    first_views = changed[: len(images)]
    return ((first_views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
