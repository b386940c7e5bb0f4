"""The classic sets, read into memory: digits, and what torchvision downloads."""

import gzip
import json
import math
import os
import socket
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files as resources
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etflight.data.base import ImageDataModule
from etflight.data.files import ListedFileImages, Paths, files_below
from etflight.data.lists import lines_of, read_lines
from etflight.data.profiles import long_tailed_subset
from etflight.data.sources import ArraySource, Split
from etflight.utils.errors import UserError, argument, brief, let_through
from etflight.utils.limits import inflate, refuse_growth

TEST_IMAGES_PER_CLASS = 50


@dataclass(eq=False)
class Digits(ImageDataModule):
    """Hand-written digits, 8×8, grey, 10 classes (Alpaydin and Kaynak, UCI 1998), as scikit-learn carries them.

    The 500 test images, 50 per class, are the same for every seed; the other 1,297 train.
    """

    class_names: ClassVar[list[str]] = list("0123456789")
    num_channels: ClassVar[int] = 1
    # over all 1,797 images
    standard_mean: ClassVar[tuple[float, ...]] = (0.3053,)
    standard_std: ClassVar[tuple[float, ...]] = (0.3760,)

    def load(self, split: Split) -> ArraySource:
        """The digits, 0 … 16 scaled to 0 … 255."""
        from sklearn.datasets import load_digits  # takes a second to import

        digits = load_digits()
        test = np.sort(long_tailed_subset(digits.target, [TEST_IMAGES_PER_CLASS] * 10))
        chosen = test if split == "test" else np.setdiff1d(np.arange(len(digits.target)), test)
        pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return ArraySource(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(digits.target[chosen]))


PATIENCE = 60.0  # seconds that a server may be silent


@dataclass(eq=False)
class TorchvisionImages(ImageDataModule):
    """A set with a fixed list of classes, which torchvision can download.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    root: str = "data"
    download: bool = False

    num_channels: ClassVar[int] = 3
    published_name: ClassVar[str]  # of its class in torchvision.datasets
    files: ClassVar[tuple[str, ...]]  # files or folders below `root` that can be read without torchvision
    downloads: ClassVar[tuple[dict[str, str], ...]] = ({},)  # options of torchvision's class, one download each

    def __str__(self) -> str:
        return f"{type(self).__name__} in {self.root}"

    @cached_property
    def class_names(self) -> list[str]:
        """The published names."""
        names: dict[str, list[str]] = json.loads((resources("etflight.data") / "class_names.json").read_text("utf-8"))
        return names[self.published_name]

    @property
    def published(self) -> Any:
        """The set's class in torchvision."""
        from torchvision import datasets  # takes seconds to import, which `--help` need not wait for

        return getattr(datasets, self.published_name)

    @property
    def is_there(self) -> bool:
        """Whether the files can be read without torchvision."""
        return all(self.find(name) for name in self.files)

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls this on one process per node.

        Raises:
            UserError: The files cannot be fetched, are not those that were published, or cannot be written.
        """
        if not self.download or self.is_there:
            return
        try:
            with careful_downloads():
                self.fetch()
        except Exception as error:  # errors of the network, of archives, and of torchvision
            raise UserError(
                f"{self}: the download failed ({brief(error, 300)}): try again, or put the files there yourself"
            ) from error

    def fetch(self) -> None:
        """Download into a separate folder and move only complete files into `root`: torchvision takes a partial file for the whole."""
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.root, prefix=".download-") as partial:
            for options in self.downloads:
                self.published(partial, download=True, **options)
            move_into(Path(partial), Path(self.root))

    def find(self, name: str) -> Path | None:
        """A file or folder below `root`; None if it is missing."""
        path = Path(self.root, name)
        return path if path.exists() else None

    def path(self, name: str) -> Path:
        """A file or folder below `root`.

        Raises:
            UserError: It is missing.
        """
        found = self.find(name)
        if found is None:
            raise self._missing(f"{name} is missing")
        return found

    def _missing(self, what: str) -> UserError:
        return UserError(f"{self}: {what}: put the files there, or give {argument(f'{self.option}.download', True)}")


@contextmanager
def careful_downloads() -> Iterator[None]:
    """Within the block, a silent server and a hostile archive make a download fail.

    A server may be silent for `PATIENCE` seconds; by default Python waits for ever. Tar archives may not have members that leave their
    folder, links out of it, devices or set-uid bits; Python itself refuses them from 3.14 on. (torchvision verifies an archive's checksum
    first; its zip files cannot leave their folder.)
    """
    timeout, extraction_filter = socket.getdefaulttimeout(), tarfile.TarFile.extraction_filter
    socket.setdefaulttimeout(PATIENCE)
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)
        tarfile.TarFile.extraction_filter = extraction_filter


def move_into(source: Path, target: Path) -> None:
    """Move a file or folder in one step, or from a folder that exists already only what is missing; existing files stay."""
    if not target.exists():
        os.replace(source, target)
    elif source.is_dir() and target.is_dir():
        for child in source.iterdir():
            move_into(child, target / child.name)


@dataclass(eq=False)
class FashionMNIST(TorchvisionImages):
    """Zalando's clothes, 28×28, grey, 10 classes, 60,000 training and 10,000 test images (Xiao et al., 2017).

    The four IDX files, compressed or not, lie in `root/FashionMNIST/raw` (as torchvision leaves them), in `root`
    itself, or where Debian's package dataset-fashion-mnist puts them.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    system_folder: ClassVar[str] = "/usr/share/datasets/fashion-mnist"
    published_name: ClassVar[str] = "FashionMNIST"
    files: ClassVar[tuple[str, ...]] = tuple(
        f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )
    num_channels: ClassVar[int] = 1
    standard_mean: ClassVar[tuple[float, ...]] = (0.2860,)
    standard_std: ClassVar[tuple[float, ...]] = (0.3530,)
    standard_crop_padding: ClassVar[int] = 2
    standard_flip: ClassVar[bool] = True

    def load(self, split: Split) -> ArraySource:
        """Read one split's two IDX files.

        Raises:
            UserError: They are missing, damaged, or of different lengths.
        """
        part = "train" if split == "train" else "t10k"
        images, labels = (
            read_idx(self.path(f"{part}-{kind}-ubyte"), d) for kind, d in (("images-idx3", 3), ("labels-idx1", 1))
        )
        if len(images) != len(labels):
            raise UserError(f"{self}: {part} has {len(images)} images but {len(labels)} labels: fetch the files again")
        return ArraySource(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))

    def find(self, name: str) -> Path | None:
        """An IDX file in one of the folders, compressed or not; None if it is missing."""
        folders = (Path(self.root, "FashionMNIST", "raw"), Path(self.root), Path(self.system_folder))
        files = (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz"))
        return next((file for file in files if file.is_file()), None)


def read_idx(file: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, gzipped if its name ends in `.gz`.

    Args:
        file: The file.
        ndim: Dimensions it must have.

    Raises:
        UserError: The file is damaged, or holds something else.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            magic, *shape = struct.unpack(f">{ndim + 1}I", stream.read(4 * (ndim + 1)))
            size = math.prod(shape)
            refuse_growth(str(file), size, file.stat().st_size)
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{file} is damaged ({error}): fetch it again") from None
    # 8 is the format's code of unsigned bytes.
    if magic != 0x800 + ndim or len(data) != size:
        raise UserError(f"{file} is no IDX file of bytes in {ndim} dimensions, or is cut short: fetch it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape).copy()


@dataclass(eq=False)
class CIFAR10(TorchvisionImages):
    """CIFAR-10: 32×32, RGB, 10 classes, 50,000 training and 10,000 test images (Krizhevsky, 2009).

    It is read from the official binary version if `root` has it, else from the python version, whose checksums
    torchvision verifies before it unpickles anything.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "CIFAR10"
    files: ClassVar[tuple[str, ...]] = ("cifar-10-batches-bin",)
    binary_files: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{part}.bin" for part in range(1, 6)),
        "test": ("test_batch.bin",),
    }
    label_bytes: ClassVar[int] = 1  # the last one is the label
    standard_mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    standard_std: ClassVar[tuple[float, ...]] = (0.2023, 0.1994, 0.2010)
    standard_crop_padding: ClassVar[int] = 4
    standard_flip: ClassVar[bool] = True

    def fetch(self) -> None:
        """Download what is missing or damaged: torchvision knows each file's checksum."""
        self.published(self.root, download=True)

    def load(self, split: Split) -> ArraySource:
        """Read one split.

        Raises:
            UserError: Its files are missing or damaged.
        """
        if self.is_there:
            records = np.concatenate([self._records(name) for name in self.binary_files[split]])
            images = records[:, self.label_bytes :].reshape(-1, 3, 32, 32)
            return ArraySource(torch.from_numpy(images), torch.from_numpy(records[:, self.label_bytes - 1]))
        try:
            data = self.published(self.root, train=split == "train")
        except RuntimeError:
            folder = Path(self.root, self.published.base_folder)
            raise self._missing(f"{folder.name} is {'damaged' if folder.is_dir() else 'missing'}") from None
        return ArraySource(torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets))

    def _records(self, name: str) -> NDArray[np.uint8]:
        file = self.path(f"{self.files[0]}/{name}")
        size = self.label_bytes + 3 * 32 * 32
        data = np.fromfile(file, dtype=np.uint8)
        if data.size == 0 or data.size % size:
            raise UserError(f"{file} has {data.size} bytes, no multiple of {size}: fetch it again")
        return data.reshape(-1, size)


@dataclass(eq=False)
class CIFAR100(CIFAR10):
    """CIFAR-100: as CIFAR-10, with 100 classes (the fine labels) and the same normalisation, as the field has it.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "CIFAR100"
    files: ClassVar[tuple[str, ...]] = ("cifar-100-binary",)
    binary_files: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("train.bin",), "test": ("test.bin",)}
    label_bytes: ClassVar[int] = 2


_TRAIN_AND_TEST = ({"split": "train"}, {"split": "test"})


@dataclass(eq=False)
class SVHN(TorchvisionImages):
    """Street View House Numbers, cropped digits: 32×32, RGB, 10 classes (Netzer et al., 2011).

    73,257 training images, the rarest digit (9) with 4,659, the most frequent (1) with 13,861; 26,032 test images. Class counts
    fall in the order 0 … 9, so n_max is at most the number of zeros, 4,948, which is also its default. Images are neither cropped at
    random nor mirrored: a mirrored digit is no digit.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "SVHN"
    files: ClassVar[tuple[str, ...]] = ("train_32x32.mat", "test_32x32.mat")
    downloads: ClassVar[tuple[dict[str, str], ...]] = _TRAIN_AND_TEST

    def load(self, split: Split) -> ArraySource:
        """Read one split's MATLAB file.

        Raises:
            UserError: The file is missing, is damaged, or holds something else.
        """
        file = self.path(f"{split}_32x32.mat")
        arrays = read_matlab(file)
        images, labels = (np.asarray(arrays.get(name)) for name in ("X", "y"))
        wrong = images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3)
        if wrong or labels.dtype.kind not in "uif" or labels.size != images.shape[3]:
            raise UserError(f"{file} has no bytes X [32, 32, 3, N] with a number in y for each image: fetch it again")
        digits = np.where(labels == 10, 0, labels).reshape(-1)
        return ArraySource(torch.from_numpy(images).permute(3, 2, 0, 1), torch.from_numpy(digits))


def read_matlab(file: Path) -> dict[str, Any]:
    """Read a MATLAB 5 file.

    SciPy would unpack anything, even to a thousand times the file's size; so it is unpacked here first, with a limit.

    Raises:
        UserError: The file is damaged, or would fill the memory.
    """
    from scipy.io import loadmat  # not needed by other sets

    content = file.read_bytes()
    plain, position = bytearray(content[:128]), 128
    try:
        if content[124:128] != b"\x00\x01IM":
            raise ValueError("no MATLAB 5 file")
        while position < len(content):
            kind, size = struct.unpack_from("<II", content, position)
            end = position + 8 + size
            compressed = 15  # the format's code
            plain += inflate(str(file), content[position + 8 : end]) if kind == compressed else content[position:end]
            position = end
        arrays: dict[str, Any] = loadmat(cast(Any, BytesIO(plain)))
    except UserError:
        raise
    except Exception as error:  # readers of broken files raise all kinds
        let_through(error)
        raise UserError(f"{file} is damaged ({error}): fetch it again") from None
    return arrays


@dataclass(eq=False)
class STL10(TorchvisionImages):
    """STL-10: 96×96, RGB, 10 classes, 5,000 training and 8,000 test images (Coates et al., 2011), without the unlabelled ones.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "STL10"
    files: ClassVar[tuple[str, ...]] = tuple(
        f"stl10_binary/{name}.bin" for name in ("train_X", "train_y", "test_X", "test_y")
    )

    def load(self, split: Split) -> ArraySource:
        """Read one split's two files.

        Raises:
            UserError: They are missing, or of different lengths.
        """
        pixels, labels = (np.fromfile(self.path(f"stl10_binary/{split}_{kind}.bin"), np.uint8) for kind in "Xy")
        if pixels.size != 3 * 96 * 96 * labels.size:
            raise UserError(
                f"{self}: {split}_X.bin and {split}_y.bin have different numbers of images: fetch them again"
            )
        images = pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)  # the files go down a column first
        return ArraySource(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) - 1))


_TRAINING = "gtsrb/GTSRB/Training"
_TEST = "gtsrb/GTSRB/Final_Test/Images"
_TEST_LABELS = "gtsrb/GT-final_test.csv"


@dataclass(eq=False)
class GTSRB(TorchvisionImages, ListedFileImages):
    """German Traffic Sign Recognition Benchmark (Stallkamp et al., 2012): 43 classes, imbalanced by nature.

    26,640 training and 12,630 test images of 15 to 250 pixels, resized to squares by the loader processes. A sign comes in many frames of
    one drive, so held-out frames (`val_fraction`) resemble those trained on. Images are not mirrored: a mirrored sign is another sign.

    Args:
        root: Folder that holds the set's folder `gtsrb`, as torchvision leaves it.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "GTSRB"
    files: ClassVar[tuple[str, ...]] = (_TRAINING, _TEST, _TEST_LABELS)
    downloads: ClassVar[tuple[dict[str, str], ...]] = _TRAIN_AND_TEST
    standard_mean: ClassVar[tuple[float, ...]] = (0.3406, 0.3128, 0.3229)
    standard_std: ClassVar[tuple[float, ...]] = (0.2773, 0.2673, 0.2744)
    standard_image_size: ClassVar[int] = 32
    standard_crop_padding: ClassVar[int] = 3

    def listed(self, split: Split) -> tuple[Paths, Tensor]:
        """The files in the folders 00000 to 00042 of the training classes, or in the order of the table of test labels."""
        if split == "train":
            lines = [
                f"{_TRAINING}/{label:05}/{file} {label}"
                for label in range(self.num_classes)
                for file in files_below(str(self.path(_TRAINING) / f"{label:05}"), {".ppm"})
            ]
        else:
            _, *rows = (line.split(";") for line in lines_of(self.path(_TEST_LABELS), "fetch it again"))
            lines = [f"{_TEST}/{row[0]} {row[-1]}" for row in rows]
        return read_lines(lines, str(self), self.root)
