"""Sets of image files whose folders tell the classes: one folder per class, CUB-200, Tiny ImageNet."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from etflight.data.base import Split
from etflight.data.files import FileImages, FileSource, ListedFileImages, Paths, PhotoRecipe, files_below
from etflight.data.lists import UNPACK, lines_of
from etflight.utils.errors import UserError
from etflight.utils.terminal import readable

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
LAYOUT = "put train/<class>/*.jpg, test/<class>/*.jpg and optionally val/<class>/*.jpg below --data.root"


@dataclass(eq=False)
class FolderImages(FileImages):
    """Image files in `root/train/<class>/`, `root/test/<class>/` and, optionally, `root/val/<class>/`.

    Files are JPEG, PNG, WebP, GIF, BMP, TIFF or PPM; classes are the folder names of `train`, sorted. Nothing is known of what the images
    show, so by default they are neither cropped at random nor mirrored.

    Args:
        root: The folder.
    """

    named_after: ClassVar[str | None] = "root"

    @cached_property
    def class_names(self) -> list[str]:
        """Folder names of `train`, sorted."""
        return [readable(folder.name) for folder in self._class_folders("train")]

    @property
    def has_val_split(self) -> bool:
        """Whether there is a folder `val`."""
        return (Path(self.root) / "val").is_dir()

    def load(self, split: Split) -> FileSource:
        """List one split's files, in class order, sorted within a class.

        Raises:
            UserError: The folder is missing or empty, or a class has no image or is not in `train`.
        """
        label_of = {folder.name: label for label, folder in enumerate(self._class_folders("train"))}
        paths: list[str] = []
        labels: list[int] = []
        for folder in self._class_folders(split):
            if folder.name not in label_of:
                raise UserError(f"{folder}: no class of train has this name: rename it, or add it to train")
            files = files_below(str(folder), SUFFIXES)
            if not files:
                raise UserError(
                    f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}): add some or remove the folder"
                )
            paths += [f"{split}/{folder.name}/{file}" for file in files]
            labels += [label_of[folder.name]] * len(files)
        return self.make_source(Paths(self.root, paths), torch.tensor(labels))

    def _class_folders(self, split: Split) -> list[Path]:
        parent = Path(self.root) / split
        if not parent.is_dir():
            raise UserError(f"{parent}: no such folder: {LAYOUT}")
        folders = sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        if not folders:
            raise UserError(f"{parent} holds no class folder: {LAYOUT}")
        return folders


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
        folder_of = {label: path.partition("/")[0] for path, label, _ in self._images}
        return [folder_of.get(label, str(label)).rpartition(".")[2] for label in range(self.num_classes)]

    def load(self, split: Split) -> FileSource:
        """The files of one split, in the order of `images.txt`.

        Raises:
            UserError: The lists are missing, do not fit each other or the published counts, or images are missing.
        """
        chosen = [(f"images/{path}", label) for path, label, trains in self._images if trains == (split == "train")]
        return self.make_listed_source(split, chosen)

    def label_file(self, split: Split) -> str:
        """`image_class_labels.txt`."""
        return str(Path(self.root, "image_class_labels.txt"))

    @cached_property
    def _images(self) -> list[tuple[str, int, bool]]:
        """The path and the label, from 0, of each image, and whether it is a training image."""
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
        """A file's value for each image number."""
        pairs = [line.partition(" ") for line in lines_of(Path(self.root, name), UNPACK)]
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
        """The first of each class's names in `words.txt`, else its WordNet number."""
        words: dict[str, str] = {}
        if Path(self.root, "words.txt").is_file():
            words = dict(line.split("\t", 1) for line in self._lines("words.txt") if "\t" in line)
        return [words.get(number, number).partition(",")[0] for number in self._numbers]

    def load(self, split: Split) -> FileSource:
        """List one split's files.

        Raises:
            UserError: Lists are missing or malformed, the counts are not the published ones, or images are missing.
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
        return self.make_listed_source(split, [(path, label_of[number]) for path, number in named])

    @cached_property
    def _numbers(self) -> list[str]:
        """WordNet numbers of the classes, sorted."""
        numbers = sorted(self._lines("wnids.txt"))
        if len(set(numbers)) != self.num_classes or not all(number.isalnum() for number in numbers):
            raise UserError(f"{self}: wnids.txt does not name {self.num_classes} classes: unpack the set again")
        return numbers

    def _lines(self, name: str) -> list[str]:
        return lines_of(Path(self.root, name), UNPACK)
