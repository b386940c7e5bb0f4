"""The classic sets, read into memory: digits, and what torchvision downloads."""

import csv
import gzip
import math
import os
import socket
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from etflight.data.base import ImageDataModule, Split
from etflight.data.files import FileSource, ListedFileImages, files_below
from etflight.data.sampler import long_tailed_subset
from etflight.data.sources import ArraySource
from etflight.utils.errors import UserError
from etflight.utils.limits import inflate, refuse_growth

TEST_IMAGES_PER_CLASS = 50


@dataclass(eq=False)
class Digits(ImageDataModule):
    """Hand-written digits, 8×8, grey, 10 classes (Alpaydin and Kaynak, UCI 1998), as scikit-learn carries them.

    The 500 test images, 50 per class, are the same for every seed; the other 1,297 train.
    """

    num_channels: ClassVar[int] = 1
    # over all 1,797 images
    standard_mean: ClassVar[tuple[float, ...]] = (0.3053,)
    standard_std: ClassVar[tuple[float, ...]] = (0.3760,)

    @property
    def class_names(self) -> list[str]:
        """`"0"` … `"9"`."""
        return [str(digit) for digit in range(10)]

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

    published_name: ClassVar[str]  # of its class in torchvision.datasets
    files: ClassVar[tuple[str, ...]]  # files below `root` that can be read without torchvision
    downloads: ClassVar[tuple[dict[str, str], ...]] = ({},)  # options of torchvision's class, one download each
    names: ClassVar[tuple[str, ...]]

    def __str__(self) -> str:
        return f"{type(self).__name__} in {self.root}"

    @property
    def class_names(self) -> list[str]:
        """The published names."""
        return list(self.names)

    @property
    def published(self) -> Any:
        """The set's class in torchvision."""
        from torchvision import datasets  # takes seconds to import, which `--help` need not wait for

        return getattr(datasets, self.published_name)

    @property
    def is_there(self) -> bool:
        """Whether the files can be read without torchvision."""
        return all(Path(self.root, name).exists() for name in self.files)

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls this on one process per node.

        Raises:
            UserError: The files cannot be fetched, are not those that were published, or cannot be written.
        """
        if not self.download or self.is_there:
            return
        try:
            with members_stay_inside(), silence_fails():
                self.fetch()
        except UserError:
            raise
        except Exception as error:  # errors of the network, of archives, and of torchvision
            reason = shorten(str(error) or type(error).__name__, 300, placeholder=" …")
            raise UserError(
                f"{self}: the download failed ({reason}): try again, or put the files there yourself"
            ) from error

    def fetch(self) -> None:
        """Download into a separate folder and move only complete files into `root`: torchvision takes a partial file for the whole."""
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.root, prefix=".download-") as partial:
            for options in self.downloads:
                self.published(partial, download=True, **options)
            move_into(Path(partial), Path(self.root))

    def path(self, name: str) -> Path:
        """A file below `root`.

        Raises:
            UserError: It is missing.
        """
        file = Path(self.root, name)
        if not file.is_file():
            raise self._missing(f"{name} is missing")
        return file

    def _missing(self, what: str) -> UserError:
        return UserError(f"{self}: {what}: put the files there, or give --data.download true")


@contextmanager
def silence_fails() -> Iterator[None]:
    """Within the block, a server that is silent for `PATIENCE` seconds counts as failed; by default Python waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def members_stay_inside() -> Iterator[None]:
    """Within the block, unpack tar archives without members that leave their folder, links out of it, devices and set-uid bits.

    Python itself does so from 3.14 on. (torchvision verifies an archive's checksum first; its zip files cannot leave their folder.)

    Raises:
        UserError: An archive has such a member; nothing more of it is unpacked.
    """
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"a downloaded archive was refused: {error}") from error
    finally:
        tarfile.TarFile.extraction_filter = before


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
    names: ClassVar[tuple[str, ...]] = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    num_channels: ClassVar[int] = 1
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

    def load(self, split: Split) -> ArraySource:
        """Read one split's two IDX files.

        Raises:
            UserError: They are missing, damaged, or of different lengths.
        """
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
    names: ClassVar[tuple[str, ...]] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    num_channels: ClassVar[int] = 3
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
    downloads: ClassVar[tuple[dict[str, str], ...]] = ({"split": "train"}, {"split": "test"})
    names: ClassVar[tuple[str, ...]] = tuple("0123456789")
    num_channels: ClassVar[int] = 3

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
        strange = labels[(labels < 1) | (labels > 10)]
        if strange.size:
            raise UserError(f"{file} has label {strange[0]}, but SVHN's are 1 … 10 (the digit 0): fetch it again")
        return ArraySource(torch.from_numpy(images).permute(3, 2, 0, 1), torch.from_numpy(labels.reshape(-1) % 10))


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
    names: ClassVar[tuple[str, ...]] = (
        "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
    )  # fmt: skip
    num_channels: ClassVar[int] = 3

    def load(self, split: Split) -> ArraySource:
        """Read one split's two files.

        Raises:
            UserError: They are missing, or of different lengths.
        """
        pixels, labels = (np.fromfile(self.path(f"stl10_binary/{split}_{kind}.bin"), np.uint8) for kind in "Xy")
        size = 3 * 96 * 96
        if pixels.size != size * labels.size:
            raise UserError(
                f"{self}: {split}_X.bin has {pixels.size} bytes, not {size} for each of the {labels.size} labels of "
                f"{split}_y.bin: fetch the files again"
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
    downloads: ClassVar[tuple[dict[str, str], ...]] = SVHN.downloads
    names: ClassVar[tuple[str, ...]] = (
        "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
        "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing of lorries",
        "right of way at the next crossing", "priority road", "give way", "stop", "no vehicles", "no lorries", "no entry",
        "danger", "curve to the left", "curve to the right", "double curve", "bumpy road", "slippery road",
        "road narrows on the right", "road works", "traffic signals", "pedestrians", "children", "bicycles", "ice or snow",
        "wild animals", "end of all limits", "turn right ahead", "turn left ahead", "ahead only", "straight on or right",
        "straight on or left", "keep right", "keep left", "roundabout", "end of no passing", "end of no passing of lorries",
    )  # fmt: skip
    num_channels: ClassVar[int] = 3
    standard_mean: ClassVar[tuple[float, ...]] = (0.3406, 0.3128, 0.3229)
    standard_std: ClassVar[tuple[float, ...]] = (0.2773, 0.2673, 0.2744)
    standard_image_size: ClassVar[int] = 32
    standard_crop_padding: ClassVar[int] = 3

    def load(self, split: Split) -> FileSource:
        """List one split's files.

        Raises:
            UserError: Images or the table of test labels are missing, or the table is malformed.
        """
        named = self._training_files() if split == "train" else self._test_files()
        if not named:
            raise self._missing(f"no {split} image is there")
        return self.make_listed_source(split, named)

    def _training_files(self) -> list[tuple[str, int]]:
        """Paths and labels; classes are folders called 00000 to 00042."""
        return [
            (f"{_TRAINING}/{label:05}/{file}", label)
            for label in range(self.num_classes)
            for file in files_below(f"{self.root}/{_TRAINING}/{label:05}", {".ppm"})
        ]

    def _test_files(self) -> list[tuple[str, int]]:
        """Paths and labels, in the order of the table."""
        file = self.path(_TEST_LABELS)
        with file.open(newline="", encoding="utf-8", errors="replace") as stream:
            rows = list(csv.DictReader(stream, delimiter=";", skipinitialspace=True))
        for row in rows:
            name, label = row.get("Filename") or "", row.get("ClassId") or ""
            if not name or "/" in name or not label.isdecimal():
                raise UserError(f"{file} has a line with file {name!r} and class {label!r}: fetch it again")
        return [(f"{_TEST}/{row['Filename']}", int(row["ClassId"])) for row in rows]
