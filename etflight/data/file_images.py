"""What sets of image files share: how pictures become squares, missing files and corrupt ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etflight.data.base import ImageDataModule, Split
from etflight.data.file_sources import FileSource, FileSplit, Square
from etflight.data.paths import Paths
from etflight.data.sampler import ImbalancedSampler, NumberedSampler
from etflight.data.sources import ImageSource, ImageSplit
from etflight.errors import UserError
from etflight.preprocessing import Preprocessing

LARGEST_SIDE = 2**14  # one such image is 805 MB


class PhotoRecipe:
    """What the field does with photographs, after ImageNet: random squares, mirrored; ImageNet's mean and standard deviation."""

    standard_mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    standard_std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)
    standard_flip: ClassVar[bool] = True
    standard_min_crop_scale: ClassVar[float] = 0.08
    standard_crop_pct: ClassVar[float] = 0.875


@dataclass(eq=False, kw_only=True)
class FileImages(ImageDataModule):
    """Image files, decoded to RGB squares by the loader processes (`num_workers`).

    A file that cannot be read ends a run with its path. With `skip_corrupt`, a training image that cannot be read is replaced by the
    next of its batch, and left out where training or validation images are evaluated; at the end of each pass over them, be it cut
    short, one line tells how many there were, and the first three. Only where none of a training batch or of a whole evaluation can be
    read the run ends. Test images are never skipped, also where they are watched in training: a
    result is over all of them.

    Args:
        image_size: Side of the square, in pixels; None: the set's standard recipe, 224 unless its images are smaller.
        min_crop_scale: In training, show a random part of the picture, at least this of its area (RandomResizedCrop); 1: the middle, as in
            evaluation; None: the set's standard recipe.
        crop_pct: In evaluation the shorter side is resized to `image_size / crop_pct` and the middle cropped (timm's name); None: the set's
            standard recipe.
        skip_corrupt: Pass over training and validation images that cannot be read, and count them.
    """

    standard_image_size: ClassVar[int] = 224
    standard_min_crop_scale: ClassVar[float] = 1.0
    standard_crop_pct: ClassVar[float] = 1.0
    sampler_class: ClassVar[type[ImbalancedSampler]] = NumberedSampler

    image_size: int | None = None
    min_crop_scale: float | None = None
    crop_pct: float | None = None
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        """Check the options that need no file."""
        super().__post_init__()
        for name, holds, rule in (
            (
                "image_size",
                self.image_size is None or 1 <= self.image_size <= LARGEST_SIDE,
                f"give from 1 to {LARGEST_SIDE} pixels",
            ),
            (
                "min_crop_scale",
                self.min_crop_scale is None or 0 < self.min_crop_scale <= 1,
                "give a part of the picture's area, above 0 and at most 1",
            ),
            (
                "crop_pct",
                self.crop_pct is None or 0.1 <= self.crop_pct <= 1,
                "give a part of the resized side, from 0.1 to 1",
            ),
        ):
            if not holds:
                raise UserError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}: {rule}")
        if self._square.side > LARGEST_SIDE:
            raise UserError(
                f"{type(self).__name__}: image_size / crop_pct is {self._square.side}: give at most {LARGEST_SIDE} pixels"
            )

    @property
    def num_channels(self) -> int:
        """3."""
        return 3

    @classmethod
    def options_for(cls, preprocessing: Preprocessing) -> dict[str, Any]:
        """Also the size of the square and its part of the picture."""
        _, height, width = preprocessing.input_size
        square = {"image_size": width, "crop_pct": preprocessing.crop_pct} if height == width else {}
        return {**super().options_for(preprocessing), **square}

    def make_split(self, name: Split, source: ImageSource, indices: NDArray[np.int64]) -> ImageSplit:
        """The chosen files, corrupt ones passed over if that was asked for and they are no test images."""
        return FileSplit(cast(FileSource, source), indices, skip_corrupt=self.skip_corrupt and name != "test")

    def read(self, *files: str | Path) -> Tensor:
        """Files from anywhere as a model takes them: decoded, resized, cropped and normalised like the test images.

        Returns:
            float32 `[B, 3, image_size, image_size]`.

        Raises:
            UserError: A file is missing or is no image; names its path.
        """
        source = self.make_source(Paths.pack("", map(str, files)), torch.zeros(len(files)))
        images, _ = self.eval_transform((source.images(torch.arange(len(files))), source.labels))
        return images

    def make_source(self, paths: Paths, labels: Tensor) -> FileSource:
        """Files with labels `[N]`, cut as the options say."""
        return FileSource(paths, labels, self._square)

    @property
    def _square(self) -> Square:
        return Square(
            self.standard_image_size if self.image_size is None else self.image_size,
            self.standard_crop_pct if self.crop_pct is None else self.crop_pct,
            self.standard_min_crop_scale if self.min_crop_scale is None else self.min_crop_scale,
        )


@dataclass(eq=False, kw_only=True)
class ListedFileImages(FileImages):
    """Image files that a list names.

    Args:
        check_files: Look whether all of them are there before training starts; false saves a second for half a million files on a local
            disk, and more on a slow one.
    """

    check_files: bool = True

    def make_listed_source(self, split: Split, paths: Paths, labels: Tensor) -> FileSource:
        """Files with labels `[N]`, cut as the options say.

        Raises:
            UserError: Some are missing; says how many, and the first three.
        """
        missing = paths.missing() if self.check_files else []
        if missing:
            rest = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise UserError(
                f"{self}: {len(missing):,} of {len(paths):,} {split} images are missing: "
                f"{', '.join(paths[i] for i in missing[:3])}{rest}: put them there, or correct --data.root"
            )
        return self.make_source(paths, labels)
