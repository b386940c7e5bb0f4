import gzip
import pickle
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets

from etflight.data import CIFAR10, CIFAR100, GTSRB, STL10, SVHN, Digits, FashionMNIST
from etflight.data.sets import move_into
from tests.data.refusals import assert_refused
from tests.hostile import Bomb


def test_digits_are_the_1797_of_scikit_learn_fifty_per_class_to_test_whatever_the_seed():
    data, published = Digits(seed=1, imbalance_ratio=10), load_digits()
    test, train = data.split("test"), data.split("train").source
    assert test.labels.bincount().tolist() == [50] * 10
    assert torch.equal(test.source.pixels, Digits().split("test").source.pixels)
    pixels, labels = torch.cat([train.pixels, test.source.pixels]).squeeze(1), torch.cat([train.labels, test.labels])
    assert (pixels.min(), pixels.max(), pixels.shape) == (0, 255, (1797, 8, 8))

    def in_order(images, labels):
        return sorted((*image.ravel().tolist(), int(y)) for image, y in zip(images, labels, strict=True))

    assert in_order(np.rint(pixels.numpy() / (255 / 16)), labels) == in_order(published.images, published.target)
    assert data.class_counts.tolist() == [128, 99, 76, 59, 46, 35, 27, 21, 16, 12]


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


@pytest.mark.parametrize(("layout", "suffix"), [("FashionMNIST/raw", ""), (".", ".gz"), ("system", ".gz")])
def test_fashion_mnist_is_read_from_every_layout(clothes, tmp_path, layout, suffix):
    files = clothes(tmp_path / layout, suffix)
    data = FashionMNIST(str(tmp_path))
    data.setup()
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = data.split(split).__getitems__([3, 1])
        assert np.array_equal(images[:, 0], files[f"{part}-images-idx3"][[3, 1]])
        assert labels.tolist() == [3, 1]
    assert data.class_counts.tolist() == [3] * 10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: None, r"FashionMNIST in .*train-images-idx3-ubyte is missing.*download=True"),
        (lambda data: data[:-3], "is damaged"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), "cut short"),
        (lambda data: gzip.compress(gzip.decompress(data)[:7]), "is damaged"),
        (lambda data: gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:]), "no IDX file of bytes"),
        (lambda data: gzip.compress(idx(np.zeros(30, np.uint8))), "in 3 dimensions"),
        (lambda data: gzip.compress(idx(np.zeros((29, 28, 28), np.uint8))), "29 images but 30 labels"),
    ],
)
def test_a_missing_or_damaged_idx_file_is_named(clothes, tmp_path, spoil, message):
    clothes(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    content = spoil(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    assert_refused(FashionMNIST(str(tmp_path)), "fit", message)


CIFARS = {CIFAR10: ("cifar-10-batches-bin", 1), CIFAR100: ("cifar-100-binary", 2)}


@pytest.fixture
def write_cifar(tmp_path):
    """Writes the binary version with one image per class and file; returns the records by file name."""

    def write(set_class):
        folder, label_bytes = CIFARS[set_class]
        (tmp_path / folder).mkdir()
        records = {}
        for name in (name for names in set_class.binary_files.values() for name in names):
            K = set_class("").num_classes
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


def test_what_cifar_lacks_is_named(write_cifar, tmp_path):
    assert_refused(CIFAR10(str(tmp_path)), "fit", r"CIFAR10 in .*cifar-10-batches-py is missing.*download=True")
    write_cifar(CIFAR10)
    file = tmp_path / "cifar-10-batches-bin/data_batch_4.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(CIFAR10(str(tmp_path)), "fit", r"data_batch_4\.bin has \d+ bytes, no multiple")
    file.unlink()
    assert_refused(CIFAR10(str(tmp_path)), "fit", r"data_batch_4\.bin is missing")


def test_a_pickle_without_the_published_checksum_is_refused_and_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, _ in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]:
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert_refused(CIFAR10(str(tmp_path)), "fit", "cifar-10-batches-py is damaged")
    assert not (tmp_path / "ran").exists()


def test_the_python_version_gives_the_same_images_as_torchvision(tmp_path, monkeypatch):
    pixels, targets = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8), list(range(10)) * 2
    verified = SimpleNamespace(data=pixels, targets=targets)  # its checksums have passed
    monkeypatch.setattr(CIFAR10, "published", staticmethod(lambda root, train: verified))
    images, labels = CIFAR10(str(tmp_path)).split("train").__getitems__([4, 13])
    assert np.array_equal(images.permute(0, 2, 3, 1), pixels[[4, 13]])
    assert labels.tolist() == [4, 3]


@pytest.fixture
def house_numbers(tmp_path):
    """Writes both MATLAB files, by default 40 training and 20 test images of the labels 1 … 10; returns the pixels `[32, 32, 3, N]`."""

    def write(compressed=True, **changes):
        pixels = {}
        for split, count in (("train", 40), ("test", 20)):
            pixels[split] = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), np.uint8)
            arrays = {"X": pixels[split], "y": (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]}
            savemat(tmp_path / f"{split}_32x32.mat", arrays | changes, do_compression=compressed)
        return pixels

    return write


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_is_read_with_label_ten_as_the_digit_zero(house_numbers, tmp_path, compressed):
    pixels = house_numbers(compressed)
    data = SVHN(str(tmp_path))
    data.setup()
    assert data.class_counts.tolist() == [4] * 10
    for split in ("train", "test"):
        images, labels = data.split(split).__getitems__([0, 8, 9, 10])
        assert np.array_equal(images.permute(2, 3, 1, 0), pixels[split][..., [0, 8, 9, 10]])
        assert labels.tolist() == [1, 9, 0, 1]


def test_svhn_asks_for_no_more_images_than_its_rare_digits_have(house_numbers, tmp_path):
    """In the released code more were asked for than exist, which made half of the labels wrong."""
    sizes = [5, 14, 10, 8, 7, 7, 6, 6, 5, 5]  # as the published ones, in thousands
    labels = np.repeat([10, *range(1, 10)], sizes)
    house_numbers(X=np.zeros((32, 32, 3, len(labels)), np.uint8), y=labels[:, None])
    data = SVHN(str(tmp_path), imbalance_ratio=5)
    assert data.class_counts.tolist() == [5, 4, 3, 2, 2, 2, 1, 1, 1, 1]
    too_many = SVHN(str(tmp_path), imbalance_ratio=5, max_count=14)
    assert_refused(too_many, "fit", r"class 0 \(0\) has 5 training images, 14 were asked for: lower max_count to 5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.full((40, 1), 11, np.uint8)}, "SVHN in .*: label 11 of train image 0 is outside 0 … 9"),
        ({"y": np.ones((39, 1), np.uint8)}, r"train_32x32\.mat has no bytes X"),
        ({"X": np.zeros((32, 32, 3, 40))}, r"train_32x32\.mat has no bytes X"),
    ],
)
def test_other_matlab_files_are_not_svhn(house_numbers, tmp_path, changes, message):
    house_numbers(**changes)
    assert_refused(SVHN(str(tmp_path)), "fit", message)


def with_bomb(data):
    bomb = zlib.compress(bytes(2**28 + 1), 1)
    return data[:128] + struct.pack("<II", 15, len(bomb)) + bomb


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-100], "is damaged"),
        (lambda data: b"\0" * 300, "is damaged"),
        (with_bomb, ".*refused, no images are like that"),
    ],
    ids=["cut", "empty", "made to fill the memory"],
)
def test_a_damaged_or_hostile_matlab_file_is_refused(house_numbers, tmp_path, spoil, message):
    house_numbers()
    file = tmp_path / "train_32x32.mat"
    file.write_bytes(spoil(file.read_bytes()))
    assert_refused(SVHN(str(tmp_path)), "fit", rf"train_32x32\.mat {message}")


@pytest.fixture
def stl(tmp_path):
    """Writes the four binary files, 20 training and 30 test images; returns the pixels `[N, 3, width, height]`."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = {}
    for split, count in (("train", 20), ("test", 30)):
        pixels[split] = np.random.default_rng(count).integers(0, 256, (count, 3, 96, 96), np.uint8)
        pixels[split].tofile(folder / f"{split}_X.bin")
        (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
    return pixels


def test_stl_is_read_upright(stl, tmp_path):
    data = STL10(str(tmp_path))
    data.setup()
    assert data.class_counts.tolist() == [2] * 10
    for split in ("train", "test"):
        assert np.array_equal(data.split(split).source.pixels, stl[split].transpose(0, 1, 3, 2))
        assert data.split(split).labels[:11].tolist() == [*range(10), 0]


def test_what_stl_lacks_is_named(stl, tmp_path):
    file = tmp_path / "stl10_binary" / "train_X.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(STL10(str(tmp_path)), "fit", r"train_X\.bin and train_y\.bin have different numbers of images")
    file.unlink()
    assert_refused(STL10(str(tmp_path)), "fit", r"STL10 in .*stl10_binary/train_X\.bin is missing.*download=True")


@pytest.mark.parametrize("set_class", [FashionMNIST, CIFAR10, SVHN, GTSRB])
def test_only_download_downloads(clothes, tmp_path, monkeypatch, set_class):
    calls = []
    published = staticmethod(lambda root, download, split=None: calls.append((Path(root), download, split)))
    monkeypatch.setattr(set_class, "published", published)
    set_class(str(tmp_path)).prepare_data()
    assert calls == []
    set_class(str(tmp_path), download=True).prepare_data()
    assert [split for _, _, split in calls] == (["train", "test"] if set_class in (SVHN, GTSRB) else [None])
    assert all(download and tmp_path in (folder, folder.parent) for folder, download, _ in calls)


def test_a_download_moves_in_beside_what_is_there(tmp_path):
    for name in ("new/set/a", "new/set/b", "new/other/c", "old/set/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    move_into(tmp_path / "new", tmp_path / "old")
    files = {str(path.relative_to(tmp_path / "old")): path.read_text() for path in tmp_path.glob("old/*/*")}
    assert files == {"set/a": "old/set/a", "set/b": "new/set/b", "other/c": "new/other/c"}


def test_what_is_there_is_not_downloaded(clothes, write_cifar, house_numbers, stl, tmp_path, monkeypatch):
    clothes(tmp_path)
    write_cifar(CIFAR10)
    house_numbers()
    for set_class in (FashionMNIST, CIFAR10, SVHN, STL10):
        monkeypatch.setattr(set_class, "published", None)
        set_class(str(tmp_path), download=True).prepare_data()


@pytest.mark.parametrize(
    ("set_class", "num_classes", "num_channels", "padding"),
    [(FashionMNIST, 10, 1, 2), (CIFAR10, 10, 3, 4), (CIFAR100, 100, 3, 4), (SVHN, 10, 3, 0), (STL10, 10, 3, 0)],
)
def test_what_the_set_fixes_is_known_without_its_files(set_class, num_classes, num_channels, padding):
    data = set_class("nowhere")
    assert (data.num_classes, data.num_channels) == (num_classes, num_channels)
    assert len(set(data.class_names)) == num_classes
    assert not data.val_is_held_out
    assert (data.standard_crop_padding, data.standard_flip) == (padding, padding > 0)
