"""Tiny ImageNet."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from etflight.data.base import Split
from etflight.data.file_images import ListedFileImages, PhotoRecipe
from etflight.data.file_sources import FileSource
from etflight.data.lists import UNPACK, lines_of
from etflight.data.paths import Paths, files_below
from etflight.errors import UserError


@dataclass(eq=False)
class TinyImageNet(PhotoRecipe, ListedFileImages):
    """Tiny ImageNet (Stanford CS231n, 2015): 64×64, 200 of ImageNet's classes, 500 training and 50 validation images each.

    As it is unpacked: `wnids.txt`, `words.txt`, `train/<class>/images/*.JPEG`, and `val/images/*.JPEG` with `val/val_annotations.txt`. The
    labels of its test images are secret; as the literature does, the validation images are the test set, watched in training. Classes come
    in the order of their WordNet numbers; `imbalance_ratio` makes Tiny-ImageNet-LT of it. In training, images are padded and cropped.

    Args:
        root: The folder `tiny-imagenet-200`.
    """

    published_counts: ClassVar[dict[Split, int]] = {"train": 100_000, "test": 10_000}
    classes: ClassVar[int] = 200
    standard_image_size: ClassVar[int] = 64
    standard_min_crop_scale: ClassVar[float] = 1.0
    standard_crop_pct: ClassVar[float] = 1.0
    standard_crop_padding: ClassVar[int] = 8

    root: str

    def __str__(self) -> str:
        return f"{type(self).__name__} in {self.root}"

    @property
    def num_classes(self) -> int:
        """200."""
        return self.classes

    @cached_property
    def class_names(self) -> list[str]:
        """The first of each class's names in `words.txt`, else its WordNet number."""
        words: dict[str, str] = {}
        if Path(self.root, "words.txt").is_file():
            words = dict(line.split("\t", 1) for line in self._lines("words.txt") if "\t" in line)
        return [words.get(number, number).partition(",")[0] for number in self._numbers]

    def load(self, split: Split) -> FileSource:
        """List one split's files.

        Raises:
            UserError: Lists are missing or malformed, there are other counts than published, or images are missing.
        """
        label_of = {number: label for label, number in enumerate(self._numbers)}
        if split == "train":
            named = [
                (f"train/{number}/images/{file}", number)
                for number in self._numbers
                for file in files_below(str(Path(self.root, "train", number, "images")), {".jpeg"})
            ]
        else:
            rows = [line.split("\t") for line in self._lines("val/val_annotations.txt")]
            wrong = next((row for row in rows if len(row) < 2 or row[1] not in label_of or "/" in row[0]), None)
            if wrong is not None:
                raise UserError(
                    f"{self}: val/val_annotations.txt has a line that begins {wrong[:2]}: unpack the set again"
                )
            named = [(f"val/images/{row[0]}", row[1]) for row in rows]
        expected = self.published_counts[split]
        if len(named) != expected:
            raise UserError(f"{self}: {len(named):,} {split} images, but the set has {expected:,}: unpack it again")
        paths, numbers = zip(*named, strict=True)
        return self.make_listed_source(
            split, Paths.pack(self.root, paths), torch.tensor([label_of[number] for number in numbers])
        )

    @cached_property
    def _numbers(self) -> list[str]:
        """WordNet numbers of the classes, sorted."""
        numbers = sorted(self._lines("wnids.txt"))
        if len(set(numbers)) != self.classes or not all(number.isalnum() for number in numbers):
            raise UserError(f"{self}: wnids.txt does not name {self.classes} classes: unpack the set again")
        return numbers

    def _lines(self, name: str) -> list[str]:
        return lines_of(Path(self.root, name), UNPACK)
