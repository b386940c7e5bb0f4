"""The classic sets that torchvision downloads, read into memory."""

import gzip
import math
import os
import socket
import tarfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from etflight.data.base import ImageDataModule, Split
from etflight.data.sources import ArraySource
from etflight.errors import UserError
from etflight.untrusted import refuse_growth

PATIENCE = 60.0


@dataclass(eq=False)
class TorchvisionImages(ImageDataModule):
    """A set with a fixed list of classes, which torchvision can download.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    root: str = "data"
    download: bool = False

    published_name: ClassVar[str]  # in torchvision.datasets
    names: ClassVar[tuple[str, ...]]
    channels: ClassVar[int]

    def __str__(self) -> str:
        return f"{type(self).__name__} in {self.root}"

    @property
    def num_classes(self) -> int:
        """K, fixed by the set."""
        return len(self.names)

    @property
    def num_channels(self) -> int:
        """C, fixed by the set."""
        return self.channels

    @property
    def class_names(self) -> list[str]:
        """The published names."""
        return list(self.names)

    @property
    def published(self) -> Any:
        """The set's class in torchvision."""
        from torchvision import datasets  # seconds, which `--help` need not wait for

        return getattr(datasets, self.published_name)

    @property
    @abstractmethod
    def is_there(self) -> bool:
        """Whether the files can be read without torchvision."""

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls this on one process per node.

        Raises:
            UserError: the files cannot be fetched, are not those that were published, or cannot be written.
        """
        if not self.download or self.is_there:
            return
        try:
            with members_stay_inside(), silence_ends():
                self.fetch()
        except UserError:
            raise
        except Exception as error:  # of the network, of archives, and torchvision's own
            reason = shorten(str(error) or type(error).__name__, 300, placeholder=" …")
            raise UserError(
                f"{self}: the download failed ({reason}): try again, or put the files there yourself"
            ) from error

    def fetch(self) -> None:
        """Download the published files into `root`."""
        self.published(self.root, download=True)

    def _missing(self, what: str) -> UserError:
        return UserError(f"{self}: {what}: put the files there, or give --data.download true")


@contextmanager
def silence_ends() -> Iterator[None]:
    """Inside, a server that says nothing for `PATIENCE` seconds has failed; by default Python waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def members_stay_inside() -> Iterator[None]:
    """Inside, tar archives are unpacked without members that leave their folder, links out of it, devices and set-uid bits.

    Python itself does so from 3.14 on. (torchvision verifies an archive's checksum first; its zip files cannot leave their folder.)

    Raises:
        UserError: an archive with such a member, of which nothing more is unpacked.
    """
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"a downloaded archive was refused: {error}") from error
    finally:
        tarfile.TarFile.extraction_filter = before


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
    names: ClassVar[tuple[str, ...]] = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    channels: ClassVar[int] = 1
    standard_mean: ClassVar[tuple[float, ...]] = (0.2860,)
    standard_std: ClassVar[tuple[float, ...]] = (0.3530,)
    standard_crop_padding: ClassVar[int] = 2
    standard_flip: ClassVar[bool] = True

    @property
    def is_there(self) -> bool:
        """Whether every IDX file is in one of the folders."""
        return all(
            self._file(f"{part}-{kind}") for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
        )

    def fetch(self) -> None:
        """Download the published files, and let only whole ones into `root`: torchvision takes half a file for the file."""
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.root, prefix=".download-") as partial:
            self.published(partial, download=True)
            to = Path(self.root, "FashionMNIST", "raw")
            to.mkdir(parents=True, exist_ok=True)
            for file in Path(partial).glob("*/raw/*"):
                os.replace(file, to / file.name)

    def load(self, split: Split) -> ArraySource:
        """Read one split's two IDX files."""
        part = "train" if split == "train" else "t10k"
        images, labels = (self._read(f"{part}-{kind}", ndim) for kind, ndim in (("images-idx3", 3), ("labels-idx1", 1)))
        if len(images) != len(labels):
            raise UserError(f"{self}: {part} has {len(images)} images but {len(labels)} labels: fetch the files again")
        return ArraySource(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))

    def _file(self, name: str) -> Path | None:
        folders = (Path(self.root, "FashionMNIST", "raw"), Path(self.root), Path(self.system_folder))
        files = (folder / f"{name}-ubyte{suffix}" for folder in folders for suffix in ("", ".gz"))
        return next((file for file in files if file.is_file()), None)

    def _read(self, name: str, ndim: int) -> NDArray[np.uint8]:
        file = self._file(name)
        if file is None:
            raise self._missing(f"{name}-ubyte.gz is missing")
        return read_idx(file, ndim)


def read_idx(file: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, gzipped if its name ends in `.gz`.

    Args:
        file: The file.
        ndim: Dimensions it must have.

    Raises:
        UserError: The file is damaged, or holds something else.
    """
    start = 4 * (ndim + 1)
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = stream.read(start)
            shape = np.frombuffer(header[4:], dtype=">u4").tolist() if len(header) == start else []
            size = math.prod(shape)
            refuse_growth(str(file), size, file.stat().st_size)
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged ({error}): fetch it again") from None
    # 8 is the format's code of unsigned bytes.
    if header[:4] != bytes([0, 0, 8, ndim]) or len(data) != size:
        raise UserError(f"{file} is no IDX file of bytes in {ndim} dimensions, or is cut short: fetch it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape).copy()


@dataclass(eq=False)
class CIFAR10(TorchvisionImages):
    """CIFAR-10: 32×32, RGB, 10 classes, 50,000 training and 10,000 test images (Krizhevsky, 2009).

    Read from the official binary version where `root` has it, else from the python version, whose checksums
    torchvision verifies before it unpickles anything.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "CIFAR10"
    binary_folder: ClassVar[str] = "cifar-10-batches-bin"
    binary_files: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{part}.bin" for part in range(1, 6)),
        "test": ("test_batch.bin",),
    }
    label_bytes: ClassVar[int] = 1  # the last one is the label
    names: ClassVar[tuple[str, ...]] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    channels: ClassVar[int] = 3
    standard_mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    standard_std: ClassVar[tuple[float, ...]] = (0.2023, 0.1994, 0.2010)
    standard_crop_padding: ClassVar[int] = 4
    standard_flip: ClassVar[bool] = True

    @property
    def is_there(self) -> bool:
        """Whether `root` has the binary version."""
        return Path(self.root, self.binary_folder).is_dir()

    def load(self, split: Split) -> ArraySource:
        """Read one split."""
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
        file = Path(self.root, self.binary_folder, name)
        size = self.label_bytes + 3 * 32 * 32
        if not file.is_file():
            raise UserError(f"{file} is missing: fetch the binary version of the set again")
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
    binary_folder: ClassVar[str] = "cifar-100-binary"
    binary_files: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("train.bin",), "test": ("test.bin",)}
    label_bytes: ClassVar[int] = 2
    names: ClassVar[tuple[str, ...]] = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
        "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
        "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
        "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
        "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
        "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
        "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
        "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
        "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
        "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip
