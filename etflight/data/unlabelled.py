"""Images from anywhere, of any size and without labels, brought to what a trained model takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etflight.data.arrays import ArrayImages, refuse_other_layouts
from etflight.data.base import ImageDataModule
from etflight.data.decoding import decode_file, fit_to, warn_of_few_levels, warn_of_few_levels_in_files, with_channels
from etflight.data.files import Square, files_below, stack
from etflight.data.sources import UNREADABLE, Batch, ImageSource, ImageSplit, Split
from etflight.utils.errors import UserError, argument, first_few


@dataclass(eq=False, kw_only=True)
class UnlabelledImages(ImageDataModule):
    """Images without labels, for `etflight predict --images`; the checkpoint knows how the model wants them.

    Images that are grey or have transparency, palettes, 16 bits or CMYK become grey or RGB as the model needs it (transparency is
    dropped). A file that cannot be read is no error: its label is `UNREADABLE`; the others have -1.

    Args:
        paths: Image files (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM), folders of them, and `.npz` files with images `[N, H, W]` or
            `[N, H, W, C]`, uint8 or uint16, as `images` or `test_images`.
        input_size: C, H and W of the model.
        crop_pct: Part of the resized image that is kept.
        names: The class names.
    """

    paths: list[str]
    input_size: tuple[int, int, int]
    crop_pct: float = 1.0
    names: list[str]

    def __str__(self) -> str:
        return ", ".join(self.paths[:3]) + ", …" * (len(self.paths) > 3)

    @property
    def num_channels(self) -> int:
        """C of the model."""
        return self.input_size[0]

    @property
    def class_names(self) -> list[str]:
        """The class names of the model."""
        return self.names

    def load(self, split: Split) -> "AnyImages":
        """List all images.

        Raises:
            UserError: A path does not exist, an array does not hold images, or training images are asked for.
        """
        if split == "train":
            raise UserError(f"{argument('images')} {self}: images without labels can be predicted, not trained on")
        return AnyImages(self.paths, self.input_size, self.crop_pct)

    def make_split(self, name: Split, source: ImageSource, indices: NDArray[np.int64]) -> ImageSplit:
        """All images in their order; one that cannot be read is black."""
        return _ReadableSplit(source, indices)

    def _checked(self, name: Split) -> ImageSource:
        return self.load(name)


class AnyImages(ImageSource):
    """Images of several files, folders and arrays, one after the other.

    Args:
        paths: Image files, folders of them, and `.npz` files.
        input_size: C, H and W of the result.
        crop_pct: Part of the resized image that is kept.

    Raises:
        UserError: A path does not exist, an array holds no images that the model can take, or there is no image.
    """

    def __init__(self, paths: Sequence[str], input_size: tuple[int, int, int], crop_pct: float) -> None:
        self._size, self.crop_pct = input_size, crop_pct
        self._covered = [Square(side, crop_pct).side for side in input_size[1:]]
        self._arrays: dict[str, NDArray[Any]] = {}
        self._pictures: list[tuple[str, int | None]] = []  # a file, and the position if it holds an array
        for path in paths:
            if path.endswith(".npz"):
                self._arrays[path] = _read_array(path, input_size[0])
                self._pictures += [(path, position) for position in range(len(self._arrays[path]))]
            elif Path(path).is_dir():
                self._pictures += [(str(Path(path) / file), None) for file in files_below(path)]
            elif Path(path).exists():
                self._pictures.append((path, None))
            else:
                raise UserError(f"{argument('images')} {path} does not exist: give image files, folders or .npz files")
        if not self._pictures:
            raise UserError(
                f"{argument('images')} {', '.join(paths)}: there is no image: give image files, folders or .npz files"
            )
        self.labels = torch.full((len(self._pictures),), -1)
        files = [path for path, position in self._pictures if position is None]
        if files:
            warn_of_few_levels_in_files(
                f"{argument('images')} {first_few(paths, len(paths))}", len(files), files.__getitem__
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W."""
        return self._size

    def __getitem__(self, index: int) -> Tensor:
        """Read one image: uint8 `[C, H, W]`.

        Raises:
            UserError: The image cannot be read, or has channels that the model cannot take.
        """
        channels, *size = self._size
        path, position = self._pictures[index]
        if position is None:
            picture = decode_file(path, max(self._covered), "GRAY" if channels == 1 else "RGB")
        else:
            pixels = self._arrays[path][position]
            if pixels.dtype == np.uint16:
                pixels = np.rint(pixels / 257).astype(np.uint8)
            picture = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return fit_to(with_channels(picture, channels, self.name(index)), size, self._covered)

    def images(self, indices: Tensor) -> Tensor:
        """Read images one by one.

        Raises:
            UserError: One of them cannot be read.
        """
        return stack([self[i] for i in indices.tolist()])

    def readable(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `images`, but black where one cannot be read, and labels `[B]`, -1 or `UNREADABLE`."""
        pictures, labels = [], []
        for i in indices.tolist():
            try:
                pictures.append(self[i])
                labels.append(-1)
            except UserError:
                pictures.append(torch.zeros(self._size, dtype=torch.uint8))
                labels.append(UNREADABLE)
        return stack(pictures), torch.tensor(labels)

    def name(self, index: int) -> str:
        """The file's path; for an image in an array, also its position."""
        path, position = self._pictures[index]
        return path if position is None else f"{path}[{position}]"


class _ReadableSplit(ImageSplit):
    source: AnyImages

    def __getitems__(self, positions: list[int]) -> Batch:
        return self.source.readable(self.indices[positions])


def _read_array(path: str, channels: int) -> NDArray[Any]:
    """The images `[N, H, W, C]` of an `.npz` file, uint8 or uint16."""
    file = ArrayImages(path)
    name = "test_images" if "test_images" in file.members and "images" not in file.members else "images"
    images = file.array(name)
    what = f"{path}: {name} is {images.dtype} of shape {list(images.shape)}"
    if images.dtype not in (np.uint8, np.uint16) or images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise UserError(f"{what}: give uint8 or uint16 [N, H, W] or [N, H, W, C]")
    refuse_other_layouts(images, what)
    if images.dtype == np.uint16:
        warn_of_few_levels(f"{path}: {name}", int(images.max(initial=0)))
    images = images if images.ndim == 4 else images[..., None]
    with_channels(torch.zeros(images.shape[3], 1, 1), channels, f"{what}, [N, H, W, C]")
    return images
