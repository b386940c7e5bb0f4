"""Caltech-UCSD Birds."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from etflight.data.base import Split
from etflight.data.file_images import ListedFileImages, PhotoRecipe
from etflight.data.file_sources import FileSource
from etflight.data.lists import UNPACK, lines_of
from etflight.data.paths import Paths
from etflight.errors import UserError


@dataclass(eq=False)
class CUB200(PhotoRecipe, ListedFileImages):
    """CUB-200-2011 (Wah et al., 2011): photographs of 200 species of birds, 5,994 training images, 29 or 30 a class, and 5,794 test images.

    As it is unpacked: `images/`, `images.txt`, `image_class_labels.txt` and `train_test_split.txt`. `imbalance_ratio` makes it long-tailed.

    Args:
        root: The folder `CUB_200_2011`.
    """

    published_counts: ClassVar[dict[Split, int]] = {"train": 5_994, "test": 5_794}
    classes: ClassVar[int] = 200

    root: str

    def __str__(self) -> str:
        return f"{type(self).__name__} in {self.root}"

    @property
    def num_classes(self) -> int:
        """200."""
        return self.classes

    @cached_property
    def class_names(self) -> list[str]:
        """`Black_footed_Albatross`, …: the folders of the images without their numbers."""
        folder_of = {label: path.partition("/")[0] for path, label, _ in self._images}
        return [folder_of.get(label, str(label)).rpartition(".")[2] for label in range(self.classes)]

    def load(self, split: Split) -> FileSource:
        """The files of one split, in the order of `images.txt`.

        Raises:
            UserError: The lists are missing, do not fit each other or the published counts, or images are missing.
        """
        chosen = [(f"images/{path}", label) for path, label, trains in self._images if trains == (split == "train")]
        expected = self.published_counts[split]
        if len(chosen) != expected:
            raise UserError(f"{self}: {len(chosen):,} {split} images, but the set has {expected:,}: unpack it again")
        paths, labels = zip(*chosen, strict=True)
        return self.make_listed_source(split, Paths.pack(self.root, paths), torch.tensor(labels))

    def label_file(self, split: Split) -> str:
        """`image_class_labels.txt`."""
        return str(Path(self.root, "image_class_labels.txt"))

    @cached_property
    def _images(self) -> list[tuple[str, int, bool]]:
        """Path, label from 0 on, and whether it is a training image."""
        paths, labels, splits = map(self._column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
        if not paths.keys() == labels.keys() == splits.keys():
            raise UserError(
                f"{self}: images.txt, image_class_labels.txt and train_test_split.txt differ in their images: unpack them again"
            )
        for number, path in paths.items():
            if path.startswith("/") or ".." in path.split("/"):
                raise UserError(f"{self}: images.txt has {path!r}, which leaves the folder: unpack it again")
            if not labels[number].isdecimal() or splits[number] not in ("0", "1"):
                raise UserError(
                    f"{self}: image {number} has label {labels[number]!r} and split {splits[number]!r}: unpack the lists again"
                )
        return [(path, int(labels[number]) - 1, splits[number] == "1") for number, path in paths.items()]

    def _column(self, name: str) -> dict[str, str]:
        """What a file has for each image's number."""
        pairs = [line.partition(" ") for line in lines_of(Path(self.root, name), UNPACK)]
        return {number: value for number, _, value in pairs}
