from pathlib import Path

import numpy as np
import pytest
import torch

from etflight.data import ArrayImages
from etflight.data.sources import ArraySource
from etflight.utils.errors import UserError
from tests.data.refusals import assert_refused


def test_class_names_of_the_file_are_used(arrays):
    data = ArrayImages(arrays(class_names=np.array(["cat", "dog", "cow"])))
    assert (data.num_classes, data.class_names) == (3, ["cat", "dog", "cow"])


def test_names_that_are_bytes_are_read_as_utf_8(arrays):
    names = np.array(["café".encode(), b"dog", b"\xff"])
    assert ArrayImages(arrays(class_names=names)).class_names == ["café", "dog", "\\udcff"]


@pytest.mark.parametrize("third", ["cat", b"cat"], ids=["text", "bytes"])
def test_classes_of_one_name_are_not_trained_on(arrays, third):
    names = [third if isinstance(third, str) else "cat", "dog", "cat"]
    path = arrays(class_names=np.array(names if third == "cat" else [name.encode() for name in names]))
    assert_refused(ArrayImages(path), "fit", rf"{path}: classes 0 and 2 are both called 'cat': give each class a name")


def test_names_that_are_one_only_in_print_are_not_trained_on(arrays):
    path = arrays(class_names=np.array([b"\xff", b"dog", b"\\udcff"]))
    assert_refused(ArrayImages(path), "fit", "classes 0 and 2 are both called")


@pytest.mark.parametrize(("size", "channels"), [(28, ()), (64, (3,))], ids=["grey", "RGB"])
def test_files_of_medmnist_are_read_as_they_are(tmp_path, size, channels, train_a_step):
    """Compressed, labels uint8 `[N, 1]`, a validation split, no names."""
    content, path = {}, tmp_path / "set.npz"
    for split, count in (("train", 12), ("val", 3), ("test", 6)):
        shape = (count, size, size, *channels)
        content[f"{split}_images"] = np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)
        content[f"{split}_labels"] = (np.arange(count) % 3).astype(np.uint8)[:, None]
    np.savez_compressed(path, **content)
    data = ArrayImages(str(path))
    data.setup()
    assert (data.class_names, data.num_channels, data.val_is_held_out) == (["0", "1", "2"], 3 if channels else 1, True)
    assert data.class_counts.tolist() == [4, 4, 4]
    for split in ("train", "val", "test"):
        (images, labels), pixels = data.split(split).__getitems__([1, 2]), content[f"{split}_images"][[1, 2]]
        assert np.array_equal(images.permute(0, 2, 3, 1).reshape(pixels.shape), pixels)
        assert labels.tolist() == [1, 2]
    train_a_step(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": None}, "test_images is missing; it holds train_images, train_labe"),
        ({"train_images": np.zeros((70, 2, 4), np.float32)}, r"train_images is float32 of shape \[70, 2, 4\]"),
        ({"train_images": np.zeros((70, 8), np.uint8)}, r"train_images is uint8 of shape \[70, 8\]"),
        ({"train_images": np.zeros((69, 2, 4), np.uint8)}, "train has 69 images but 70 labels"),
        ({"train_labels": np.zeros(70, np.float64)}, r"train_labels is float64 of shape \[70\]"),
        ({"train_labels": np.zeros((70, 2), int)}, r"train_labels is int64 of shape \[70, 2\]: .*one per image"),
        ({"train_images": np.zeros((70, 28, 28, 28), np.uint8)}, "or volumes"),
        ({"train_images": np.zeros((0, 2, 4), np.uint8), "train_labels": np.zeros(0, int)}, "train holds no image"),
        ({"train_labels": np.full(70, 70)}, "the largest label is 70, of 70 images: give labels from 0 without gaps"),
        ({"train_labels": np.repeat([0, 2], 35)}, r"class 1 \(1\) has no training image"),
        ({"test_images": np.zeros((13, 2, 4), np.uint8)}, "but train_images has 3 channels"),
        (
            {"test_images": np.zeros((13, 3, 6, 3), np.uint8)},
            r"test_images is uint8 of shape \[13, 3, 6, 3\], but train_images are 2 × 4 pixels: give all splits images of one size",
        ),
        ({"train_images": np.zeros((70, 3, 9, 9), np.uint8)}, "looks like \\[N, C, H, W\\]"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(arrays, changes, message):
    path = arrays(**changes)
    assert_refused(ArrayImages(path), None, rf"{path}.*{message}")


def test_damaged_files_are_refused(arrays):
    file = Path(arrays())
    data = bytearray(file.read_bytes())
    data[1000:1100] = bytes(100)  # within the pixels of train_images
    file.write_bytes(data)
    assert_refused(ArrayImages(str(file)), "fit", "train_images cannot be read")
    file.write_text("hello")
    assert_refused(ArrayImages(str(file)), "fit", r"set\.npz is no \.npz file")


def test_a_test_split_of_another_size_is_refused_even_where_only_it_is_read(arrays):
    path = arrays(test_images=np.zeros((13, 3, 6, 3), np.uint8))
    assert_refused(ArrayImages(path), "test", "but train_images are 2 × 4 pixels")


@pytest.mark.parametrize(
    "images", [torch.rand(4, 1, 8, 8), np.zeros((4, 1, 8, 8), np.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8)],
    ids=["float", "numpy", "flat"],
)  # fmt: skip
def test_images_in_memory_are_uint8_tensors_or_refused(images):
    with pytest.raises(UserError, match=r"images must be a tensor \[N, C, H, W\] of dtype uint8"):
        ArraySource(images, torch.zeros(4, dtype=torch.long))
