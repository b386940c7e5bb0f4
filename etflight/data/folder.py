"""Image files in one folder per class."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from etflight.data.base import ImageDataModule, Split
from etflight.data.sources import FileSource
from etflight.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
LARGEST_SIDE = 2**14  # one such image is 805 MB
LAYOUT = "expected are train/<class>/*.jpg, test/<class>/*.jpg and optionally val/<class>/*.jpg"


@dataclass(eq=False)
class FolderImages(ImageDataModule):
    """Image files (JPEG, PNG, WebP) in `root/train/<class>/`, `root/test/<class>/` and, optionally, `root/val/<class>/`.

    The classes are the folder names of `train`, sorted. Images become RGB: the shorter side is resized to
    `image_size`, the centre cropped. Nothing is known of what they show, so by default they are neither cropped at
    random nor mirrored.

    Args:
        root: The folder.
        image_size: Side of the square, in pixels.
    """

    root: str
    image_size: int = 224

    def __post_init__(self) -> None:
        """Check the options that need no file."""
        super().__post_init__()
        if not 1 <= self.image_size <= LARGEST_SIDE:
            raise UserError(
                f"{type(self).__name__}: image_size is {self.image_size}: give from 1 to {LARGEST_SIDE} pixels"
            )

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.root}"

    @cached_property
    def class_names(self) -> list[str]:
        """Folder names of `train`, sorted."""
        return [folder.name for folder in self._class_folders("train")]

    @property
    def num_classes(self) -> int:
        """K, the folders of `train`."""
        return len(self.class_names)

    @property
    def num_channels(self) -> int:
        """3."""
        return 3

    @property
    def has_val_split(self) -> bool:
        """Whether there is a folder `val`."""
        return (Path(self.root) / "val").is_dir()

    def load(self, split: Split) -> FileSource:
        """List one split's files, in class order, sorted within a class."""
        label_of = {name: label for label, name in enumerate(self.class_names)}
        paths: list[Path] = []
        labels: list[int] = []
        for folder in self._class_folders(split):
            if folder.name not in label_of:
                raise UserError(f"{folder}: no class of train has this name: rename it, or add it to train")
            files = sorted(
                file
                for file in folder.rglob("*")
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
            )
            if not files:
                raise UserError(
                    f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}): add some or remove the folder"
                )
            paths += files
            labels += [label_of[folder.name]] * len(files)
        return FileSource(paths, torch.tensor(labels), self.image_size)

    def read(self, *files: str | Path) -> Tensor:
        """Files from anywhere as a model takes them: decoded, resized, cropped and normalised like the test images.

        Returns:
            float32 `[B, 3, image_size, image_size]`.

        Raises:
            UserError: A file is missing or is no image; names its path.
        """
        source = FileSource([Path(file) for file in files], torch.zeros(len(files)), self.image_size)
        images, _ = self.eval_transform((source.images(torch.arange(len(files))), source.labels))
        return images

    def _class_folders(self, split: Split) -> list[Path]:
        parent = Path(self.root) / split
        if not parent.is_dir():
            raise UserError(f"{parent}: no such folder: {LAYOUT}")
        folders = sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        if not folders:
            raise UserError(f"{parent} holds no class folder: {LAYOUT}")
        return folders
