import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from etflight.data import CIFAR10, CIFAR100, FashionMNIST
from etflight.errors import UserError


def idx(array):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Writes the four IDX files, 30 training and 20 test images, and returns them as arrays by name."""
    monkeypatch.setattr(FashionMNIST, "system_folder", str(tmp_path / "system"))

    def write(folder, suffix=".gz"):
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for part, count in (("train", 30), ("t10k", 20)):
            files[f"{part}-images-idx3"] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
            files[f"{part}-labels-idx1"] = (np.arange(count) % 10).astype(np.uint8)
        for name, array in files.items():
            data = idx(array)
            (folder / f"{name}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)
        return files

    return write


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", ["FashionMNIST/raw", ".", "system"])
def test_fashion_mnist_is_read_from_every_layout(clothes, tmp_path, layout, suffix):
    files = clothes(tmp_path / layout, suffix)
    data = FashionMNIST(str(tmp_path))
    data.setup()
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = data.split(split).__getitems__([3, 1])
        assert np.array_equal(images[:, 0], files[f"{part}-images-idx3"][[3, 1]])
        assert labels.tolist() == [3, 1]
    assert data.class_counts.tolist() == [3] * 10


def test_what_fashion_mnist_lacks_is_named_with_the_mend(clothes, tmp_path):
    clothes(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        UserError, match=r"FashionMNIST in .*t10k-labels-idx1-ubyte.gz is missing.*--data.download true"
    ):
        FashionMNIST(str(tmp_path)).setup("test")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-3], "is damaged"),
        (lambda data: b"no gzip at all", "is damaged"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), "cut short"),
        (lambda data: gzip.compress(b"\0\0"), "no IDX file"),
        (lambda data: gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:]), "no IDX file of bytes"),
        (lambda data: gzip.compress(idx(np.zeros(30, np.uint8))), "in 3 dimensions"),
        (lambda data: gzip.compress(idx(np.zeros((29, 28, 28), np.uint8))), "29 images but 30 labels"),
    ],
)
def test_a_damaged_idx_file_is_refused(clothes, tmp_path, spoil, message):
    clothes(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        FashionMNIST(str(tmp_path)).setup("fit")


CIFARS = {CIFAR10: ("cifar-10-batches-bin", 1), CIFAR100: ("cifar-100-binary", 2)}


@pytest.fixture
def write_cifar(tmp_path):
    """Writes the binary version with one image per class and file; returns the records by file name."""

    def write(set_class):
        folder, label_bytes = CIFARS[set_class]
        (tmp_path / folder).mkdir()
        records = {}
        for name in (name for names in set_class.binary_files.values() for name in names):
            K = len(set_class.names)
            array = np.random.default_rng(len(records)).integers(0, 256, (K, label_bytes + 3072), np.uint8)
            array[:, label_bytes - 1] = np.arange(K)
            array.tofile(tmp_path / folder / name)
            records[name] = array
        return records

    return write


@pytest.mark.parametrize("set_class", CIFARS)
def test_the_binary_version_of_cifar_is_read_in_file_order(write_cifar, tmp_path, set_class):
    records = write_cifar(set_class)
    data = set_class(root=str(tmp_path))
    data.setup()
    assert data.class_counts.tolist() == [len(set_class.binary_files["train"])] * data.num_classes
    for split, names in set_class.binary_files.items():
        expected = np.concatenate([records[name] for name in names])
        pixels, labels = data.split(split).source.pixels, data.split(split).labels
        assert np.array_equal(pixels.reshape(len(pixels), -1), expected[:, -3072:])
        assert np.array_equal(labels, expected[:, -3073])
        assert pixels.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize("set_class", CIFARS)
def test_a_binary_file_of_a_wrong_size_is_refused(write_cifar, tmp_path, set_class):
    write_cifar(set_class)
    file = tmp_path / CIFARS[set_class][0] / set_class.binary_files["train"][-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{file.name} has \d+ bytes, no multiple"):
        set_class(str(tmp_path)).setup("fit")


def test_a_missing_binary_file_is_named(write_cifar, tmp_path):
    write_cifar(CIFAR10)
    (tmp_path / "cifar-10-batches-bin/data_batch_4.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_4\.bin is missing"):
        CIFAR10(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(("set_class", "folder"), [(CIFAR10, "cifar-10-batches-py"), (CIFAR100, "cifar-100-python")])
def test_absent_cifar_names_the_folder_and_the_mend(tmp_path, set_class, folder):
    with pytest.raises(UserError, match=rf"{set_class.__name__} in .*{folder} is missing.*--data.download true"):
        set_class(str(tmp_path)).setup("fit")


class Marker:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_without_the_published_checksum_is_refused_and_never_loaded(tmp_path):
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, _ in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]:
        (folder / name).write_bytes(pickle.dumps(Marker(str(tmp_path / "loaded"))))
    with pytest.raises(UserError, match="cifar-10-batches-py is damaged"):
        CIFAR10(str(tmp_path)).setup("fit")
    assert not (tmp_path / "loaded").exists()


def test_the_python_version_gives_the_same_images_as_torchvision(tmp_path, monkeypatch):
    class Verified:
        """Stands for torchvision's class after its checksums have passed."""

        base_folder = "cifar-10-batches-py"

        def __init__(self, root, train):
            self.data = np.random.default_rng(train).integers(0, 256, (20, 32, 32, 3), np.uint8)
            self.targets = list(range(10)) * 2

    monkeypatch.setattr(CIFAR10, "published", Verified)
    data = CIFAR10(str(tmp_path))
    images, labels = data.split("train").__getitems__([4, 13])
    assert np.array_equal(images.permute(0, 2, 3, 1), Verified("", True).data[[4, 13]])
    assert labels.tolist() == [4, 3]


@pytest.mark.parametrize("set_class", [FashionMNIST, CIFAR10, CIFAR100])
def test_only_download_downloads(clothes, tmp_path, monkeypatch, set_class):
    calls = []
    published = staticmethod(lambda root, download: calls.append((Path(root), download)))
    monkeypatch.setattr(set_class, "published", published)
    set_class(str(tmp_path)).prepare_data()
    assert calls == []
    set_class(str(tmp_path), download=True).prepare_data()
    ((folder, download),) = calls
    assert download
    assert tmp_path in (folder, folder.parent)


def test_what_is_there_is_not_downloaded(clothes, write_cifar, tmp_path, monkeypatch):
    clothes(tmp_path)
    write_cifar(CIFAR10)
    for set_class in (FashionMNIST, CIFAR10):
        monkeypatch.setattr(set_class, "published", None)
        set_class(str(tmp_path), download=True).prepare_data()


@pytest.mark.parametrize(
    ("set_class", "num_classes", "num_channels", "padding"),
    [(FashionMNIST, 10, 1, 2), (CIFAR10, 10, 3, 4), (CIFAR100, 100, 3, 4)],
)
def test_what_the_set_fixes_is_known_without_its_files(set_class, num_classes, num_channels, padding):
    data = set_class("nowhere")
    assert (data.num_classes, data.num_channels) == (num_classes, num_channels)
    assert len(set(data.class_names)) == num_classes
    assert not data.val_is_held_out
    images, _ = data.train_transform((torch.zeros(4, num_channels, 32, 32, dtype=torch.uint8), torch.arange(4)), 0)
    assert images.shape == (4, num_channels, 32, 32)
    assert (data._augment.crop_padding, data._augment.flip) == (padding, True)
