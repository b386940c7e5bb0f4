"""The classic sets that torchvision downloads, read into memory without it."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from etflight.data.base import Split
from etflight.data.sources import ArraySource
from etflight.data.torchvision_images import TorchvisionImages
from etflight.errors import UserError
from etflight.untrusted import inflate, refuse_growth


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


@dataclass(eq=False)
class SVHN(TorchvisionImages):
    """Street View House Numbers, cropped digits: 32×32, RGB, 10 classes (Netzer et al., 2011).

    73,257 training images, the rarest digit (9) with 4,659, the most frequent (1) with 13,861; 26,032 test images. Class counts
    fall in the order 0 … 9, so that n_max can be no more than the 4,948 zeros, which is what it is without `max_count`.
    Neither cropped at random nor mirrored: a mirrored digit is none.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    published_name: ClassVar[str] = "SVHN"
    names: ClassVar[tuple[str, ...]] = tuple("0123456789")
    channels: ClassVar[int] = 3

    @property
    def is_there(self) -> bool:
        """Whether `root` has both files."""
        return all(self._file(split).is_file() for split in ("train", "test"))

    def download_to(self, folder: str) -> None:
        """Let torchvision download both files."""
        for split in ("train", "test"):
            self.published(folder, split=split, download=True)

    def load(self, split: Split) -> ArraySource:
        """Read one split's MATLAB file.

        Raises:
            UserError: It is missing, damaged, or holds something else.
        """
        file = self._file(split)
        if not file.is_file():
            raise self._missing(f"{file.name} is missing")
        arrays = read_matlab(file)
        images, labels = (np.asarray(arrays.get(name)) for name in ("X", "y"))
        wrong = images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3)
        if wrong or labels.dtype.kind not in "uif" or labels.size != images.shape[3]:
            raise UserError(f"{file} has no bytes X [32, 32, 3, N] with a number in y for each image: fetch it again")
        strange = labels[(labels < 1) | (labels > 10)]
        if strange.size:
            raise UserError(f"{file} has label {strange[0]}, but SVHN's are 1 … 10 (the digit 0): fetch it again")
        return ArraySource(torch.from_numpy(images).permute(3, 2, 0, 1), torch.from_numpy(labels.reshape(-1) % 10))

    def _file(self, split: str) -> Path:
        return Path(self.root, f"{split}_32x32.mat")


def read_matlab(file: Path) -> dict[str, Any]:
    """Read a MATLAB 5 file.

    SciPy unpacks whatever is in it, a thousand times as much as there is; so that is done before, with a limit.

    Raises:
        UserError: The file is damaged, or made to fill the memory.
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
    names: ClassVar[tuple[str, ...]] = (
        "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
    )  # fmt: skip
    channels: ClassVar[int] = 3

    @property
    def is_there(self) -> bool:
        """Whether `root` has the four files."""
        return all(self._file(f"{split}_{kind}.bin").is_file() for split in ("train", "test") for kind in "Xy")

    def load(self, split: Split) -> ArraySource:
        """Read one split's two files.

        Raises:
            UserError: They are missing, or of different lengths.
        """
        pixels, labels = self._read(f"{split}_X.bin"), self._read(f"{split}_y.bin")
        size = 3 * 96 * 96
        if pixels.size != size * labels.size:
            raise UserError(
                f"{self}: {split}_X.bin has {pixels.size} bytes, not {size} for each of the {labels.size} labels of "
                f"{split}_y.bin: fetch the files again"
            )
        images = pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)  # the files go down a column first
        return ArraySource(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) - 1))

    def _file(self, name: str) -> Path:
        return Path(self.root, "stl10_binary", name)

    def _read(self, name: str) -> NDArray[np.uint8]:
        file = self._file(name)
        if not file.is_file():
            raise self._missing(f"stl10_binary/{name} is missing")
        return np.fromfile(file, dtype=np.uint8)
