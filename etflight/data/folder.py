"""Image files in one folder per class."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from etflight.data.base import Split
from etflight.data.file_images import FileImages
from etflight.data.file_sources import FileSource
from etflight.data.paths import Paths, files_below
from etflight.errors import UserError
from etflight.terminal import readable

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
LAYOUT = "expected are train/<class>/*.jpg, test/<class>/*.jpg and optionally val/<class>/*.jpg below --data.root"


@dataclass(eq=False)
class FolderImages(FileImages):
    """Image files in `root/train/<class>/`, `root/test/<class>/` and, optionally, `root/val/<class>/`.

    Files are JPEG, PNG, WebP, GIF, BMP, TIFF or PPM, the classes the folder names of `train`, sorted. Nothing is known of what the images
    show, so by default they are neither cropped at random nor mirrored.

    Args:
        root: The folder.
    """

    named_after: ClassVar[str | None] = "root"

    root: str

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.root}"

    @cached_property
    def class_names(self) -> list[str]:
        """Folder names of `train`, sorted."""
        return [readable(folder.name) for folder in self._class_folders("train")]

    @property
    def num_classes(self) -> int:
        """K, the folders of `train`."""
        return len(self.class_names)

    @property
    def has_val_split(self) -> bool:
        """Whether there is a folder `val`."""
        return (Path(self.root) / "val").is_dir()

    def load(self, split: Split) -> FileSource:
        """List one split's files, in class order, sorted within a class.

        Raises:
            UserError: The folder is missing or empty, a class has no image, or train does not have it.
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
        return self.make_source(Paths.pack(self.root, paths), torch.tensor(labels))

    def _class_folders(self, split: Split) -> list[Path]:
        parent = Path(self.root) / split
        if not parent.is_dir():
            raise UserError(f"{parent}: no such folder: {LAYOUT}")
        folders = sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        if not folders:
            raise UserError(f"{parent} holds no class folder: {LAYOUT}")
        return folders
