"""Sets of image files that lists of "path label" lines choose: the large long-tailed ones, and anybody's own."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from etflight.data.files import ListedFileImages, Paths, PhotoRecipe
from etflight.data.sources import Split, number_of_classes
from etflight.utils.errors import UserError, argument
from etflight.utils.terminal import readable

_MOST_DIGITS = 9  # of a label


@dataclass(eq=False)
class ListImages(ListedFileImages):
    """Image files that `train.txt`, `test.txt` and, optionally, `val.txt` name: lines of a path below `root`, a blank and a label.

    Labels count from 0 without gaps. If each class lies in a folder of its own, the folder's name is the class name.

    Args:
        root: Folder that the paths are relative to.
        lists: Folder that holds the lists.
        names: File of K lines, each with the name of a class's folder, a blank and a name; or only with a name, in the order of the
            labels. None: the folders' names, or the labels.
    """

    list_files: ClassVar[dict[Split, str]] = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}
    named_after: ClassVar[str | None] = "root"

    lists: str
    names: str | None = None

    @property
    def num_classes(self) -> int:
        """K, fixed by the set, or else the largest training label plus one.

        Raises:
            UserError: The training list cannot be read, or its labels do not count from 0.
        """
        if self.published_classes is not None:
            return self.published_classes
        return number_of_classes(self._training_list[1].numpy(), str(self._list("train")))

    @property
    def has_val_split(self) -> bool:
        """Whether the set has a validation list."""
        return "val" in self.list_files and (bool(self.published_counts) or self._list("val").is_file())

    @cached_property
    def class_names(self) -> list[str]:
        """The names of the classes' folders, or the file's `names` for them; else the labels as text."""
        folders = self._folders
        known = [self.class_name(folder) for folder in folders] or [str(k) for k in range(self.num_classes)]
        if len(set(known)) < len(known):  # cars/red, cars/blue, boats/red
            parts = [folder.split("/") for folder in folders]
            known = ["/".join(own[_common_parts(parts) :]) for own in parts]
        return list(map(readable, known if self.names is None else read_names(Path(self.names), known)))

    def class_name(self, folder: str) -> str:
        """The name of the class whose images lie in this folder."""
        return folder.rpartition("/")[2]

    @cached_property
    def content(self) -> str:
        """Twelve hexadecimal digits over the paths and labels in the training list, independent of where its images lie."""
        return self.make_source(*self._training_list).content

    def listed(self, split: Split) -> tuple[Paths, Tensor]:
        """The images of the split's list, where they are."""
        paths, labels = self._read(split)
        return self._existing_paths(paths, labels), labels

    def label_file(self, split: Split) -> str:
        """The list of the split."""
        return str(self._list(split))

    def _list(self, split: Split) -> Path:
        return Path(self.lists, self.list_files[split])

    def _existing_paths(self, paths: Paths, labels: Tensor) -> Paths:
        """The paths; if the first image is not there, with each class's folder added or removed, if that leads to it."""
        if os.path.exists(paths[0]) or int(labels.max()) >= len(self._folders):
            return paths
        names = [self.class_name(folder) for folder in self._folders]

        def moved(path: str, label: int) -> str:
            folder, file = os.path.split(path)
            parent, last = os.path.split(folder)
            return os.path.join(*((parent,) if last == names[label] else (folder, names[label])), file)

        if not os.path.exists(os.path.join(self.root, moved(paths.relative(0), int(labels[0])))):
            return paths
        return Paths(self.root, map(moved, paths.all_relative(), labels.tolist()))

    def _read(self, split: Split) -> tuple[Paths, Tensor]:
        return self._training_list if split == "train" else read_list(self._list(split), self.root)

    @cached_property
    def _training_list(self) -> tuple[Paths, Tensor]:
        return read_list(self._list("train"), self.root)

    @cached_property
    def _folders(self) -> list[str]:
        """The folder of each class, judged by its first and last image; empty if the classes do not lie in K folders.

        A folder ends with the part of the path that tells the classes apart: `train/n01` for `train/n01/images/x.jpg`.
        """
        lists = [split for split in self.list_files if self._list(split).is_file()]  # a test needs only its own list
        paths, labels = self._read(lists[0] if lists else "train")
        sizes = np.bincount(labels.numpy(), minlength=self.num_classes)
        if not sizes.all():
            return []
        order, ends = np.argsort(labels.numpy(), kind="stable"), sizes.cumsum()
        first, last = ([paths.relative(i).split("/")[:-1] for i in order[at]] for at in (ends - sizes, ends - 1))
        if first != last:
            depth = min(map(_common_parts, zip(first, last, strict=True)))
            first = [folder[:depth] for folder in first]
        if len(set(map(tuple, first))) < len(first):
            return []
        while min(map(len, first)) > 1 and len({folder[-1] for folder in first}) == 1:
            first = [folder[:-1] for folder in first]
        return ["/".join(folder) for folder in first]


@dataclass(eq=False)
class ImageNetLT(PhotoRecipe, ListImages):
    """ImageNet-LT (Liu et al., CVPR 2019): 1,000 classes of 1,280 to 5 training images, 115,846 in all; 20,000 to validate, 50,000 to test.

    The lists `ImageNet_LT_train.txt`, `ImageNet_LT_val.txt` and `ImageNet_LT_test.txt` choose from ILSVRC 2012.

    Args:
        root: Folder with ILSVRC's `train` and `val`.
        lists: Folder that holds the lists.
        names: File of a class name per line, or of a folder's name and a class name.
    """

    list_files: ClassVar[dict[Split, str]] = {split: f"ImageNet_LT_{split}.txt" for split in ("train", "val", "test")}
    published_counts: ClassVar[dict[Split, int]] = {"train": 115_846, "val": 20_000, "test": 50_000}
    published_classes: ClassVar[int | None] = 1000


@dataclass(eq=False)
class PlacesLT(PhotoRecipe, ListImages):
    """Places-LT (Liu et al., CVPR 2019): 365 classes of 4,980 to 5 training images, 62,500 in all; 7,300 to validate, 36,500 to test.

    The lists `Places_LT_train.txt`, `Places_LT_val.txt` and `Places_LT_test.txt` are published in two styles: for folders `train/<class>`
    and `val/<class>`, and for Places365 as it is unpacked, `data_256/<letter>/<class>` and `val_256`. Both give the same class names.

    Args:
        root: Folder that the lists' paths are relative to.
        lists: Folder that holds the lists.
        names: File of a class name per line, or of a folder's name and a class name.
    """

    list_files: ClassVar[dict[Split, str]] = {split: f"Places_LT_{split}.txt" for split in ("train", "val", "test")}
    published_counts: ClassVar[dict[Split, int]] = {"train": 62_500, "val": 7_300, "test": 36_500}
    published_classes: ClassVar[int | None] = 365

    def class_name(self, folder: str) -> str:
        """The name in both styles: `apartment_building-outdoor`, also for `a/apartment_building/outdoor`."""
        unpacked = re.search(r"(?:^|/)([a-z])/(\1.*)", folder)
        return unpacked[2].replace("/", "-") if unpacked else super().class_name(folder)


@dataclass(eq=False)
class INaturalist2018(PhotoRecipe, ListImages):
    """iNaturalist 2018 (Van Horn et al., CVPR 2018): 8,142 species of 1,000 to 2 training images, 437,513 in all; 24,426 validation images.

    The lists are `iNaturalist18_train.txt` and `iNaturalist18_val.txt`. The labels of the competition's test images are secret;
    as in the literature, the validation images are the test set, watched in training. Without `names`, classes are called by numbers.

    Args:
        root: Folder with `train_val2018`.
        lists: Folder that holds the lists.
        names: File of a class name per line, or of a folder's name and a class name.
    """

    list_files: ClassVar[dict[Split, str]] = {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"}
    published_counts: ClassVar[dict[Split, int]] = {"train": 437_513, "test": 24_426}
    published_classes: ClassVar[int | None] = 8142
    standard_mean: ClassVar[tuple[float, ...]] = (0.466, 0.471, 0.380)
    standard_std: ClassVar[tuple[float, ...]] = (0.195, 0.194, 0.192)


def _common_parts(folders: Sequence[list[str]]) -> int:
    """The number of leading parts that paths have in common."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))


def read_names(file: Path, folders: list[str]) -> list[str]:
    """Read K class names, one per line.

    Args:
        file: The file. Lines have a class's folder, a blank and a name, in any order; or only a name, in the order of the labels.
        folders: `[K]`, the names of the classes' folders.

    Raises:
        UserError: The file cannot be read, or has another number of lines.
    """
    lines = lines_of(file, f"give the file of the names as {argument('data.names')}")
    if len(lines) != len(folders):
        raise UserError(f"{file} has {len(lines):,} names for {len(folders):,} classes: give one line per class")
    by_folder = {folder: name.strip() for folder, _, name in (line.partition(" ") for line in lines)}
    return [by_folder[folder] or folder for folder in folders] if by_folder.keys() == set(folders) else lines


def lines_of(file: Path, mend: str) -> list[str]:
    """The lines of a text file, without empty ones.

    Args:
        file: The file, in UTF-8.
        mend: What to do if it cannot be read, for the error.

    Raises:
        UserError: The file cannot be read.
    """
    return [line.strip() for line in _text_of(file, mend).split("\n") if line.strip()]


def lines_of_set(file: Path) -> list[str]:
    """As `lines_of`, of a file that comes with a set."""
    return lines_of(file, f"unpack the set there, or correct {argument('data.root')}")


def _text_of(file: Path, mend: str) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {mend}") from None
    if "\0" in text:
        raise UserError(f"{file} is no text in UTF-8: {mend}")
    return text


def read_list(file: Path, root: str) -> tuple[Paths, Tensor]:
    """Read a list of `read_lines`, in UTF-8.

    Args:
        file: The list.
        root: Folder that the paths are relative to and may not leave.

    Returns:
        N paths and their labels, int64 `[N]`.

    Raises:
        UserError: The file cannot be read, or is refused by `read_lines`.
    """
    mend = f"give the folder that holds the lists as {argument('data.lists')}"
    return read_lines(_text_of(file, mend).split("\n"), str(file), root)


def read_lines(lines: Iterable[str], where: str, root: str) -> tuple[Paths, Tensor]:
    """Read lines of a path, blanks and a label; empty lines are skipped.

    Args:
        lines: The lines.
        where: The place that they come from, for the error.
        root: Folder that the paths are relative to and may not leave.

    Returns:
        N paths and their labels, int64 `[N]`.

    Raises:
        UserError: There is no image, a line of another form, or a path that leaves the folder.
    """
    paths, labels = [], []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        path, label = line.rsplit(maxsplit=1) if " " in line or "\t" in line else ("", "")
        problem = None
        if not path or not label.isdecimal() or len(label) > _MOST_DIGITS:
            problem = "is no path and label: give a path below the root, a blank and a number from 0 on"
        elif path.startswith("/") or (".." in path and ".." in path.split("/")):
            problem = "leaves the root: give paths below it"
        if problem:
            raise UserError(f"{where}: line {number} ({line[:200]!r}) {problem}")
        paths.append(path)
        labels.append(int(label))
    if not paths:
        raise UserError(f"{where} names no image: give lines of a path below the root, a blank and a label")
    return Paths(root, paths), torch.tensor(labels)
