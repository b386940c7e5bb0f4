"""Any image set in one `.npz` file, in MedMNIST's layout."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from etflight.data.base import ImageDataModule
from etflight.data.sources import ArraySource, Split, number_of_classes
from etflight.utils.errors import UserError, brief
from etflight.utils.limits import refuse_growth
from etflight.utils.terminal import readable


@dataclass(eq=False)
class ArrayImages(ImageDataModule):
    """Images from one `.npz` file in MedMNIST's layout (Yang et al., Scientific Data 2023).

    `train_images` and `test_images`, uint8 `[N, H, W]` or `[N, H, W, C]`; `train_labels` and `test_labels`, integers
    `[N]` or `[N, 1]`; optionally `val_images`, `val_labels` and `class_names` `[K]`, texts or UTF-8. All splits have images of
    one size. Without `class_names`, K is the largest training label plus one. Nothing in the file is unpickled, and an array that
    unpacks to more than 256 MiB and a hundred times its size in the file is not read. MedMNIST's own 2D files, of any size, are
    read as they are; its multi-label sets (ChestMNIST) and its volumes are refused.

    Args:
        path: The file.
    """

    named_after: ClassVar[str | None] = "path"

    path: str

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.path}"

    @cached_property
    def class_names(self) -> list[str]:
        """The file's `class_names`, else the labels as text.

        Raises:
            UserError: The training labels do not count from 0.
        """
        if "class_names" in self.members:
            return [readable(name) for name in self.array("class_names").reshape(-1)]
        return list(map(str, range(number_of_classes(self._labels("train"), f"{self.path}: train_labels"))))

    @cached_property
    def num_channels(self) -> int:
        """C of the training images."""
        return self._training_shape[3] if len(self._training_shape) == 4 else 1

    @cached_property
    def _training_shape(self) -> tuple[int, ...]:
        """The shape in the header of `train_images`."""
        with self._member("train_images") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, *_ = read(stream)
        return tuple(shape)

    @property
    def has_val_split(self) -> bool:
        """Whether the file has `val_images`."""
        return "val_images" in self.members

    def load(self, split: Split) -> ArraySource:
        """Read one split's two arrays.

        Raises:
            UserError: They are missing, damaged, of another type or shape, or of different lengths.
        """
        images = self.array(f"{split}_images")
        what = f"{self.path}: {split}_images is {images.dtype} of shape {list(images.shape)}"
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
            raise UserError(f"{what}: give uint8 [N, H, W] or [N, H, W, C], none of H, W and C 0")
        refuse_other_layouts(images, what)
        channels = images.shape[3] if images.ndim == 4 else 1
        if channels != self.num_channels:
            raise UserError(f"{what}, but train_images has {self.num_channels} channels: give the same number")
        if images.shape[1:3] != self._training_shape[1:3]:
            size = " × ".join(map(str, self._training_shape[1:3]))
            raise UserError(f"{what}, but train_images are {size} pixels: give all splits images of one size")
        labels = self._labels(split)
        if len(images) != len(labels):
            raise UserError(
                f"{self.path}: {split} has {len(images)} images but {len(labels)} labels: give one per image"
            )
        pixels = torch.from_numpy(images[..., None] if images.ndim == 3 else images).permute(0, 3, 1, 2)
        return ArraySource(pixels, torch.from_numpy(labels))

    @cached_property
    def members(self) -> list[str]:
        """Names of the arrays in the file.

        Raises:
            UserError: The file is missing, or is no `.npz` file.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path} is no .npz file ({reason}): give one that numpy.savez has written") from None

    def array(self, name: str) -> NDArray[np.generic]:
        """One array of the file.

        Raises:
            UserError: The array is missing, or cannot be read.
        """
        with self._member(name) as stream:
            array: NDArray[np.generic] = np.lib.format.read_array(stream, allow_pickle=False)
            return array

    @contextmanager
    def _member(self, name: str) -> Iterator[IO[bytes]]:
        """The bytes of an array's `.npy` file; any error over a damaged or hostile one becomes one line."""
        if name not in self.members:
            raise UserError(f"{self.path}: {name} is missing; it holds {', '.join(self.members) or 'nothing'}")
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                member = archive.getinfo(f"{name}.npy")
                packed = min(member.compress_size, Path(self.path).stat().st_size)
                refuse_growth(f"{self.path}: {name}", member.file_size, packed)
                yield stream
        except UserError:
            raise
        except Exception as error:  # want of memory too, which a hostile header can cause
            raise UserError(
                f"{self.path}: {name} cannot be read ({brief(error)}): store plain arrays of numbers"
            ) from None

    def _labels(self, split: Split) -> NDArray[np.int64]:
        labels = self.array(f"{split}_labels")
        if labels.dtype.kind not in "iu" or labels.shape[1:] not in ((), (1,)):
            raise UserError(
                f"{self.path}: {split}_labels is {labels.dtype} of shape {list(labels.shape)}: give integers [N] or [N, 1], one per image"
            )
        return labels.reshape(-1).astype(np.int64)


def refuse_other_layouts(images: NDArray[np.generic], what: str) -> None:
    """Refuse images that have their channels where H should be, and volumes.

    Args:
        images: `[N, H, W]` or `[N, H, W, C]`.
        what: The array, for the error.

    Raises:
        UserError: The images look like `[N, C, H, W]` or `[N, D, H, W]`.
    """
    if images.ndim == 4 and images.shape[3] > 4 and (images.shape[1] in (1, 3) or len(set(images.shape[1:])) == 1):
        raise UserError(f"{what}, which looks like [N, C, H, W] or volumes: give images, [N, H, W] or [N, H, W, C]")
