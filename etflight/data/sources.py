"""The sources of a split's images, and the data set that loaders read."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from etflight.data.sampler import Draw
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32

Batch = tuple[Tensor, Tensor]
Split = Literal["train", "val", "test"]
UNREADABLE = -2  # the label of an image that could not be read, whose pixels are black


def number_of_classes(labels: NDArray[np.int64], where: str) -> int:
    """The largest label plus one.

    Args:
        labels: `[N]`.
        where: The place of the labels, for the error.

    Raises:
        UserError: There are fewer images than classes, or no label is 0 or more.
    """
    largest = int(labels.max(initial=-1))
    if not 0 <= largest < len(labels):
        raise UserError(
            f"{where}: the largest label is {largest}, of {len(labels)} images: give labels from 0 without gaps"
        )
    return largest + 1


class ImageSource(ABC):
    """All images of one split, before any subset is chosen.

    Attributes:
        labels: Int64 `[N]`.
        crop_pct: The part of the resized shorter side that was kept, in (0, 1]; timm's name.
        folder: The absolute path of the folder that image files are in; None for images in memory.
    """

    labels: Tensor
    crop_pct: float = 1.0
    folder: str | None = None

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """The images at `indices` (int64 `[B]`): uint8 `[B, C, H, W]`, contiguous."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W of every image."""
        channels, height, width = self.images(torch.tensor([0])).shape[1:]
        return channels, height, width

    def name(self, index: int) -> str:
        """The name of image `index` for people."""
        return str(index)

    @property
    def content(self) -> str:
        """Twelve hexadecimal digits (SHA-256) over all labels and `marks`, which identify these images."""
        digest = hashlib.sha256(self.labels.numpy().astype("<i8").data)
        for mark in self.marks():
            digest.update(mark)
        return digest.hexdigest()[:12]

    def marks(self) -> Iterable[bytes | memoryview]:
        """What identifies these images besides their labels; here, their names."""
        return (self.name(i).encode(errors="surrogateescape") + b"\0" for i in range(len(self.labels)))

    def sizes(self, indices: Tensor) -> NDArray[np.int64]:
        """The sizes in bytes of the files of the images at `indices`, `[B]`; empty for images that are no files, whose `marks` tell all."""
        return np.empty(0, np.int64)


class ArraySource(ImageSource):
    """Images in memory.

    Args:
        images: Uint8 `[N, C, H, W]` tensor.
        labels: `[N]` tensor of integers.

    Raises:
        UserError: They are something else.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        for name, value, shape in (
            ("images", images, "[N, C, H, W] of dtype uint8"),
            ("labels", labels, "[N] of integers"),
        ):
            fine = isinstance(value, Tensor) and not value.is_floating_point() and value.ndim == shape.count(",") + 1
            if not fine or (name == "images" and value.dtype != torch.uint8):
                got = f"{value.dtype} {list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
                raise UserError(f"ArraySource: {name} must be a tensor {shape}, got {got}")
        self.pixels = images.contiguous()
        self.labels = labels.long()

    def images(self, indices: Tensor) -> Tensor:
        """Fetch the whole batch in one call."""
        return self.pixels.index_select(0, indices)

    def marks(self) -> Iterable[bytes | memoryview]:
        """The images' shape and all pixels, which takes a tenth of a second for the 150 MB of CIFAR-10."""
        return str(list(self.pixels.shape)).encode(), self.pixels.numpy().data


class ImageSplit(Dataset[Batch]):
    """The images of a source that one split uses, fetched a whole batch at a time.

    Args:
        source: The images.
        indices: Int64 `[N]` positions in the source.
    """

    def __init__(self, source: ImageSource, indices: NDArray[np.int64]) -> None:
        self.source = source
        self.indices = torch.from_numpy(indices)
        self.labels = source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W of every image."""
        return self.source.image_shape

    def __getitems__(self, positions: list[int]) -> Batch:
        """Images uint8 `[B, C, H, W]` and labels int64 `[B]`; DataLoader calls this once per batch."""
        where = torch.from_numpy(np.array(positions, np.int64))  # `torch.tensor` of a list is several times as slow
        return self.source.images(self.indices.index_select(0, where)), self.labels.index_select(0, where)

    def __getitem__(self, position: int) -> Batch:
        """One image uint8 `[C, H, W]` and its label, int64 without dimensions."""
        images, labels = self.__getitems__([position])
        return images[0], labels[0]

    def name(self, position: int) -> str:
        """The name of the image at `position` for people."""
        return self.source.name(int(self.indices[position]))

    def end_pass(self) -> None:
        """Loaders call this after the last batch of a pass."""


class FeatureSplit(ImageSplit):
    """The images of a split by the features that a backbone has computed of them; loaders read these in place of the images.

    Args:
        images: The images.
        features: Their pooled features `[N, d]`, in the same order.

    Attributes:
        images: The images.
    """

    def __init__(self, images: ImageSplit, features: Tensor) -> None:
        super().__init__(images.source, images.indices.numpy())
        self.images = images
        self.labels = images.labels
        self.features = features

    def __getitems__(self, positions: Sequence[int | Draw]) -> Batch:
        """Features `[B, d]`, float32 or float64, and labels int64 `[B]`."""
        where = torch.tensor([position.position if isinstance(position, Draw) else position for position in positions])
        return at_least_float32(self.features.index_select(0, where)), self.labels.index_select(0, where)
