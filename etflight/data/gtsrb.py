"""German traffic signs."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from etflight.data.base import Split
from etflight.data.file_images import ListedFileImages
from etflight.data.file_sources import FileSource
from etflight.data.paths import Paths, files_below
from etflight.data.torchvision_images import TorchvisionImages
from etflight.errors import UserError

_TRAINING = "gtsrb/GTSRB/Training"
_TEST = "gtsrb/GTSRB/Final_Test/Images"
_TEST_LABELS = "gtsrb/GT-final_test.csv"


@dataclass(eq=False)
class GTSRB(TorchvisionImages, ListedFileImages):
    """German Traffic Sign Recognition Benchmark (Stallkamp et al., 2012): 43 classes, imbalanced by nature.

    26,640 training and 12,630 test images of 15 to 250 pixels, resized to squares by the loader processes. A sign comes in many frames of
    one drive, so that held out frames (`val_fraction`) resemble those trained on. Not mirrored: a mirrored sign is another sign.

    Args:
        root: Folder that holds the set's folder `gtsrb`, as torchvision leaves it.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "GTSRB"
    names: ClassVar[tuple[str, ...]] = (
        "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
        "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing of lorries",
        "right of way at the next crossing", "priority road", "give way", "stop", "no vehicles", "no lorries", "no entry",
        "danger", "curve to the left", "curve to the right", "double curve", "bumpy road", "slippery road",
        "road narrows on the right", "road works", "traffic signals", "pedestrians", "children", "bicycles", "ice or snow",
        "wild animals", "end of all limits", "turn right ahead", "turn left ahead", "ahead only", "straight on or right",
        "straight on or left", "keep right", "keep left", "roundabout", "end of no passing", "end of no passing of lorries",
    )  # fmt: skip
    channels: ClassVar[int] = 3
    standard_mean: ClassVar[tuple[float, ...]] = (0.3406, 0.3128, 0.3229)
    standard_std: ClassVar[tuple[float, ...]] = (0.2773, 0.2673, 0.2744)
    standard_image_size: ClassVar[int] = 32
    standard_crop_padding: ClassVar[int] = 3

    @property
    def is_there(self) -> bool:
        """Whether `root` has both folders of images and the test labels."""
        return all(Path(self.root, name).exists() for name in (_TRAINING, _TEST, _TEST_LABELS))

    def download_to(self, folder: str) -> None:
        """Let torchvision download both splits."""
        for split in ("train", "test"):
            self.published(folder, split=split, download=True)

    def load(self, split: Split) -> FileSource:
        """List one split's files.

        Raises:
            UserError: They, or the table of test labels, are missing, or the table is malformed.
        """
        named = self._training_files() if split == "train" else self._test_files()
        if not named:
            raise self._missing(f"no {split} image is there")
        paths, labels = zip(*named, strict=True)
        return self.make_listed_source(split, Paths.pack(self.root, paths), torch.tensor(labels))

    def _training_files(self) -> list[tuple[str, int]]:
        """Paths and labels; classes are folders called 00000 to 00042."""
        folders = [(f"{_TRAINING}/{label:05}", label) for label in range(self.num_classes)]
        return [
            (f"{folder}/{file}", label)
            for folder, label in folders
            for file in files_below(str(Path(self.root, folder)), {".ppm"})
        ]

    def _test_files(self) -> list[tuple[str, int]]:
        """Paths and labels, in the order of the table."""
        file = Path(self.root, _TEST_LABELS)
        if not file.is_file():
            raise self._missing(f"{file.name} is missing")
        with file.open(newline="", encoding="utf-8", errors="replace") as stream:
            rows = list(csv.DictReader(stream, delimiter=";", skipinitialspace=True))
        for row in rows:
            name, label = row.get("Filename") or "", row.get("ClassId") or ""
            if not name or "/" in name or not label.isdecimal():
                raise UserError(f"{file} has a line with file {name!r} and class {label!r}: fetch it again")
        return [(f"{_TEST}/{row['Filename']}", int(row["ClassId"])) for row in rows]
