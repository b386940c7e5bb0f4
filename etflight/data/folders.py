"""Sets of image files whose folders tell the classes: one folder per class, CUB-200, Tiny ImageNet."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from etflight.data.files import FileImages, FileSource, ListedFileImages, Paths, PhotoRecipe, files_below
from etflight.data.lists import lines_of_set, read_lines
from etflight.data.sources import Split
from etflight.utils.errors import UserError, argument
from etflight.utils.terminal import readable

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(eq=False)
class FolderImages(FileImages):
    """Image files in `root/train/<class>/`, `root/test/<class>/` and, optionally, `root/val/<class>/`; or all in `root/<class>/`.

    Files are JPEG, PNG, WebP, GIF, BMP, TIFF or PPM; classes are the folder names of `train`, sorted. Nothing is known of what the images
    show, so by default they are neither cropped at random nor mirrored.

    Without folders `train`, `val` and `test`, a part of each class's images is the test set. Which ones depends on nothing but the names of
    the class and its files: it is the same choice on every machine and for every `seed`, and new files change it little.

    Args:
        root: The folder.
        test_fraction: That part, above 0 and below 1: of a class at least one image, but never its last.
    """

    named_after: ClassVar[str | None] = "root"

    test_fraction: float = field(default=0.2, kw_only=True)

    _division_told: bool = field(default=False, init=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options that need no file."""
        super().__post_init__()
        self._refuse_unless(0 < self.test_fraction < 1, "test_fraction", "give a part above 0 and below 1")

    @cached_property
    def class_names(self) -> list[str]:
        """Folder names of `train`, or else of `root`, sorted."""
        return [readable(folder.name) for folder in self._class_folders("train")]

    @property
    def has_val_split(self) -> bool:
        """Whether there is a folder `val`."""
        return (Path(self.root) / "val").is_dir()

    def load(self, split: Split) -> FileSource:
        """List one split's files, in class order, sorted within a class.

        Raises:
            UserError: The folder is missing or empty, or a class is not in `train`.
        """
        paths: list[str] = []
        labels: list[int] = []
        for folder, label in self._labelled(self._class_folders(split)):
            files = self._of_split(split, folder)
            paths += [str(folder.relative_to(self.root) / file) for file in files]
            labels += [label] * len(files)
        if self.draws_test and not self._division_told:
            self._division_told = True
            rank_zero_info(
                f"{self}: without folders train and test, {self.test_fraction:.3g} of each class's images, chosen by their names, are "
                f"test images ({argument(f'{self.option}.test_fraction')})"
            )
        return self.make_source(Paths(self.root, paths), torch.tensor(labels))

    def untested(self) -> set[int]:
        """As in the base class, plus the classes without a folder in `test`, if there is one; no image is listed for that.

        Raises:
            UserError: A class of `test` is not in `train`.
        """
        if self.draws_test:
            self.split("test")
        known = super().untested()
        if self.draws_test or not (folders := self._folders("test")):
            return known
        return known | set(range(self.num_classes)).difference(label for _, label in self._labelled(folders))

    def _labelled(self, folders: list[Path]) -> Iterator[tuple[Path, int]]:
        label_of = {folder.name: label for label, folder in enumerate(self._class_folders("train"))}
        for folder in folders:
            if folder.name not in label_of:
                raise UserError(f"{folder}: no class of train has this name: rename it, or add it to train")
            yield folder, label_of[folder.name]

    @cached_property
    def draws_test(self) -> bool:
        """Whether there are classes with images, but no folder of a split, so that test images are drawn."""
        root = Path(self.root)
        return not any((root / split).is_dir() for split in get_args(Split)) and any(
            path.suffix.lower() in SUFFIXES for path in root.glob("[!.]*/[!.]*")
        )

    def _of_split(self, split: Split, folder: Path) -> list[str]:
        """The files of a class's folder that belong to a split."""
        files = files_below(str(folder), SUFFIXES)
        if not self.draws_test:
            return files
        by_hash = sorted(files, key=lambda file: sha256(os.fsencode(f"{folder.name}/{file}")).digest())
        count = min(max(round(self.test_fraction * len(files)), 1), max(len(files) - 1, 0))
        test = set(by_hash[:count])
        return [file for file in files if (file in test) == (split == "test")]

    def _class_folders(self, split: Split) -> list[Path]:
        if not (folders := self._folders(split)):
            parent = Path(self.root) / split
            reason = "holds no class folder" if parent.is_dir() else "does not exist"
            raise UserError(
                f"{parent} {reason}: put train/<class>/*.jpg, test/<class>/*.jpg and optionally val/<class>/*.jpg, or <class>/*.jpg alone, "
                f"below {argument('data.root')}"
            )
        return folders

    def _folders(self, split: Split) -> list[Path]:
        parent = Path(self.root) if self.draws_test else Path(self.root) / split
        return sorted(folder for folder in parent.glob("[!.]*") if folder.is_dir())


@dataclass(eq=False)
class CUB200(PhotoRecipe, ListedFileImages):
    """CUB-200-2011 (Wah et al., 2011): photographs of 200 species of birds, 5,994 training images, 29 or 30 a class, and 5,794 test images.

    The folder holds `images/`, `images.txt`, `image_class_labels.txt` and `train_test_split.txt`. `imbalance_ratio` makes it long-tailed.

    Args:
        root: The folder `CUB_200_2011`.
    """

    published_counts: ClassVar[dict[Split, int]] = {"train": 5_994, "test": 5_794}
    published_classes: ClassVar[int | None] = 200

    @cached_property
    def class_names(self) -> list[str]:
        """`Black_footed_Albatross`, …: the names of the images' folders without their numbers."""
        folders = {path.partition("/")[0] for path in self._column("images.txt").values()}
        return [folder.partition(".")[2] for folder in sorted(folders)]

    def listed(self, split: Split) -> tuple[Paths, Tensor]:
        """The files of one split, in the order of `images.txt`."""
        labels, splits = self._column("image_class_labels.txt"), self._column("train_test_split.txt")
        chosen = "1" if split == "train" else "0"
        lines = (
            f"images/{path} {labels.get(number, '')}"
            for number, path in self._column("images.txt").items()
            if splits.get(number) == chosen
        )
        paths, from_one = read_lines(lines, str(self), self.root)
        return paths, from_one - 1

    def _column(self, name: str) -> dict[str, str]:
        """A file's value for each image number."""
        pairs = [line.partition(" ") for line in lines_of_set(Path(self.root, name))]
        return {number: value for number, _, value in pairs}


@dataclass(eq=False)
class TinyImageNet(PhotoRecipe, ListedFileImages):
    """Tiny ImageNet (Stanford CS231n, 2015): 64×64, 200 of ImageNet's classes, 500 training and 50 validation images each.

    The folder holds `wnids.txt`, `words.txt`, `train/<class>/images/*.JPEG`, and `val/images/*.JPEG` with `val/val_annotations.txt`.
    The labels of its test images are secret; as in the literature, the validation images are the test set, watched in training. Classes are
    in the order of their WordNet numbers; `imbalance_ratio` makes Tiny-ImageNet-LT of it. In training, images are padded and cropped.

    Args:
        root: The folder `tiny-imagenet-200`.
    """

    published_counts: ClassVar[dict[Split, int]] = {"train": 100_000, "test": 10_000}
    published_classes: ClassVar[int | None] = 200
    standard_image_size: ClassVar[int] = 64
    standard_min_crop_scale: ClassVar[float] = 1.0
    standard_crop_pct: ClassVar[float] = 1.0
    standard_crop_padding: ClassVar[int] = 8

    @cached_property
    def class_names(self) -> list[str]:
        """The first of each class's names in `words.txt`, with its WordNet number where several share it; else that number."""
        words: dict[str, str] = {}
        if Path(self.root, "words.txt").is_file():
            words = dict(line.split("\t", 1) for line in self._lines("words.txt") if "\t" in line)
        names = [words.get(number, number).partition(",")[0] for number in self._numbers]
        times = Counter(names)
        return [
            name if times[name] == 1 else f"{name} {number}" for name, number in zip(names, self._numbers, strict=True)
        ]

    def listed(self, split: Split) -> tuple[Paths, Tensor]:
        """The files in the classes' folders, or in the order of `val_annotations.txt`."""
        label_of = {number: label for label, number in enumerate(self._numbers)}
        if split == "train":
            lines = [
                f"train/{number}/images/{file} {label}"
                for number, label in label_of.items()
                for file in files_below(str(Path(self.root, "train", number, "images")), {".jpeg"})
            ]
        else:
            rows = (line.split("\t")[:2] for line in self._lines("val/val_annotations.txt"))
            lines = [f"val/images/{row[0]} {label_of.get(row[-1], row[-1])}" for row in rows]
        return read_lines(lines, str(self), self.root)

    @property
    def _numbers(self) -> list[str]:
        """WordNet numbers of the classes, sorted."""
        return sorted(self._lines("wnids.txt"))

    def _lines(self, name: str) -> list[str]:
        return lines_of_set(Path(self.root, name))
