"""Some classes of another set, numbered anew."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etflight.data.base import RECIPE, ImageDataModule
from etflight.data.sources import ImageSource, ImageSplit, Split
from etflight.utils.errors import UserError


@dataclass(eq=False)
class ClassSubset(ImageDataModule):
    """Some classes of another set, numbered from 0 in the order given: to keep the others unknown, or for later.

    Which images are used, their augmentation and loading are options of this data module, those of `images` stay at their defaults. The
    recipe (normalisation, crop and so on) is that of `images`.

    Args:
        images: The set with all classes.
        classes: The labels that are used, such as "0-5" or "7,0-2", where "0-5" means 0, 1, 2, 3, 4 and 5.

    Raises:
        UserError: The labels are malformed, given twice or unknown to the set, or options of the inner set would have no effect.
    """

    images: ImageDataModule
    classes: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = _parse_labels(self.classes)
        self.images.option = f"{self.option}.images"
        for option in fields(ImageDataModule):
            if (
                option.init
                and option.name not in ("mean", "std")
                and getattr(self.images, option.name) != option.default
            ):
                raise UserError(
                    f"ClassSubset: images.{option.name} has no effect: give {option.name} to ClassSubset itself"
                )
        for name in ("standard_mean", "standard_std", "standard_crop_padding", "standard_flip", "sampler_class"):
            setattr(self, name, getattr(self.images, name))
        for name in ("mean", "std"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.images, name))
        known = self.images.num_classes
        if beyond := [label for label in self.labels if label >= known]:
            raise UserError(
                f"ClassSubset: class {beyond[0]} is not in {self.images}, which has {known}: give labels below {known}"
            )

    def __str__(self) -> str:
        return f"classes {self.classes} of {self.images}"

    @classmethod
    def name_with(cls, options: Mapping[str, Any]) -> str:
        """The name of the set, and its classes; for `images` its own name will do."""
        images = options["images"]
        return f"{images.dataset_name if isinstance(images, ImageDataModule) else images} {options['classes']}"

    @property
    def num_channels(self) -> int:
        """C of the set."""
        return self.images.num_channels

    @cached_property
    def class_names(self) -> list[str]:
        """The names of the classes that are used."""
        names = self.images.class_names
        return [names[label] for label in self.labels]

    @property
    def num_classes(self) -> int:
        """The number of classes that are used."""
        return len(self.labels)

    @property
    def has_val_split(self) -> bool:
        """Whether the set comes with a validation split."""
        return self.images.has_val_split

    @cached_property
    def content(self) -> str:
        """Twelve hexadecimal digits that identify the training images of the whole set."""
        return self.images.content

    @property
    def training_options(self) -> dict[str, Any]:
        """Its own, and what only the set has, such as how it cuts pictures."""
        return self.images.training_options | super().training_options

    @property
    def changing(self) -> dict[str, Any]:
        """Its own, and what only the set has; the recipe of `images` is an option of this module."""
        inner = {name: value for name, value in self.images.changing.items() if name.rpartition(".")[2] not in RECIPE}
        return inner | super().changing

    @property
    def _labels_are_free(self) -> bool:
        return super()._labels_are_free or self.labels != sorted(self.labels)

    def prepare_data(self) -> None:
        """Let the set download what is missing, if asked to."""
        self.images.prepare_data()

    def load(self, split: Split) -> "_SubsetSource":
        """Read one split of the set, and keep the images of these classes."""
        return _SubsetSource(self.images._checked(split), self.labels, self.images.num_classes)

    def make_split(self, name: Split, source: ImageSource, indices: NDArray[np.int64]) -> ImageSplit:
        """The chosen images as the set itself reads them, with the new labels."""
        if not isinstance(source, _SubsetSource):  # that of a split made here
            return self.images.make_split(name, source, indices)
        split = self.images.make_split(name, source.all, source.positions[indices].numpy())
        split.labels = source.labels[indices]
        return split

    def label_file(self, split: Split) -> str:
        """The set's own."""
        return self.images.label_file(split)


class _SubsetSource(ImageSource):
    """The images of some classes of a source, in its order.

    Args:
        source: All images.
        labels: The labels that are kept; each becomes its position in the list.
        num_classes: The number of classes of the source.

    Attributes:
        all: The source.
        positions: Int64 `[N]`, where the images are in the source.
    """

    def __init__(self, source: ImageSource, labels: list[int], num_classes: int) -> None:
        new = torch.full((num_classes,), -1)
        new[labels] = torch.arange(len(labels))
        self.all = source
        self.positions = torch.nonzero(new[source.labels] >= 0).flatten()
        self.labels = new[source.labels[self.positions]]

    def images(self, indices: Tensor) -> Tensor:
        return self.all.images(self.positions[indices])

    def name(self, index: int) -> str:
        return self.all.name(int(self.positions[index]))

    def sizes(self, indices: Tensor) -> NDArray[np.int64]:
        return self.all.sizes(self.positions[indices])


def _parse_labels(text: str) -> list[int]:
    """Read "7,0-2" as [7, 0, 1, 2]."""
    labels: list[int] = []
    for part in str(text).split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"ClassSubset: classes is {text!r}: give labels and ranges of labels, such as 0-5 or 7,0-2")
        if int(last or first) >= 2**24:
            raise UserError(f"ClassSubset: classes is {text!r}: give labels of the set")
        labels += range(int(first), int(last or first) + 1)
    if len(set(labels)) < len(labels):
        raise UserError(f"ClassSubset: classes {text!r} names a label twice: give each once")
    return labels
