"""`ClassSubset`: some classes of another set."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from etflight.data import CIFAR10, ArrayImages, ClassSubset, Digits, FolderImages
from etflight.utils.errors import UserError, options_for_arguments


def pixels(data, split):
    """All images of a split as they are evaluated, before they are normalised, and their labels."""
    images, labels = zip(*data.eval_dataloader(split), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_it_has_the_images_of_its_classes_in_the_sets_order_and_numbers_them_as_they_are_given(split):
    images, labels = pixels(Digits(), split)
    chosen, renamed = pixels(ClassSubset(Digits(), "7,2-3"), split)
    kept = np.flatnonzero(np.isin(labels, [2, 3, 7]))
    assert torch.equal(chosen, images[kept])
    assert renamed.tolist() == [{7: 0, 2: 1, 3: 2}[int(label)] for label in labels[kept]]


def test_names_counts_and_recipe_are_those_of_its_classes():
    data, whole = ClassSubset(Digits(), "7,2-3"), Digits()
    assert data.class_names == ["7", "2", "3"]
    assert data.num_classes == 3
    assert data.class_counts.tolist() == whole.class_counts[[7, 2, 3]].tolist()
    assert data.preprocessing == whole.preprocessing
    assert data.dataset_name == ClassSubset.name_with({"images": "Digits", "classes": "7,2-3"}) == "Digits 7,2-3"


def test_the_fingerprint_has_the_content_of_the_whole_set_and_the_choice_within_it():
    fives, sixes = (ClassSubset(Digits(), classes).fingerprint for classes in ("0-5", "0-6"))
    content = Digits().fingerprint.partition("-")[0]
    assert fives.partition("-")[0] == sixes.partition("-")[0] == content
    assert fives != sixes


def test_the_same_classes_in_another_order_are_other_training_data():
    assert ClassSubset(Digits(), "0,1").fingerprint == ClassSubset(Digits(), "0-1").fingerprint
    assert ClassSubset(Digits(), "1,0").fingerprint != ClassSubset(Digits(), "0,1").fingerprint


def test_profile_and_validation_images_are_taken_within_the_classes():
    data = ClassSubset(Digits(), "3-5", imbalance_ratio=10, max_count=50, val_fraction=0.1)
    assert data.class_counts.tolist() == [50, 15, 5]
    val = np.bincount(data.split("val").labels)
    assert val.tolist() == np.rint(0.1 * Digits().class_counts[3:6]).tolist()


def test_files_are_read_as_the_set_reads_them(tmp_path, capsys):
    for k, name in enumerate(("bee", "cat", "dog")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 9), (40 * k, 0, 0)).save(folder / "a.png")
        (folder / "broken.png").write_bytes(b"no image")
    data = ClassSubset(FolderImages(str(tmp_path), image_size=4, skip_corrupt=True), "2,0")
    assert data.class_names == ["dog", "bee"]
    images, labels = pixels(data, "train")
    assert sorted(zip(labels.tolist(), images[:, 0, 0, 0].tolist(), strict=True)) == [(0, 80), (1, 0)]
    assert "2 images could not be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "classes is '': give labels and ranges"),
        ("5-2", "classes is '5-2': give labels and ranges"),
        ("-1", "classes is '-1'"),
        ("1,0-2", "names a label twice"),
        ("8-10", "class 10 is not in Digits, which has 10"),
        ("0-99999999999", "give labels of the set"),
    ],
)
def test_invalid_classes_are_refused(classes, message):
    with pytest.raises(UserError, match=message):
        ClassSubset(Digits(), classes)


@pytest.mark.parametrize(("option", "value"), [("imbalance_ratio", 10), ("batch_size", 7)])
def test_options_of_the_inner_set_that_would_have_no_effect_are_refused(option, value):
    with pytest.raises(UserError, match=rf"images\.{option} has no effect: give {option} to ClassSubset"):
        ClassSubset(Digits(**{option: value}), "0-5")


def test_the_inner_set_downloads_what_is_missing():
    asked = []

    class Downloaded(Digits):
        def prepare_data(self):
            asked.append(self)

    inner = Downloaded()
    ClassSubset(inner, "0-5").prepare_data()
    assert asked == [inner]


def test_missing_files_of_the_inner_set_are_asked_for_by_its_own_option(tmp_path):
    data = ClassSubset(CIFAR10(root=str(tmp_path)), "0-5")
    data.prepare_data()
    for messages, option in (
        (nullcontext(), "download=True"),
        (options_for_arguments(), r"--data\.images\.download true"),
    ):
        with messages, pytest.raises(UserError, match=f"put the files there, or give {option}"):
            data.setup("fit")


def test_one_class_can_be_evaluated_but_not_trained_on():
    data = ClassSubset(Digits(), "4")
    assert len(pixels(data, "test")[1]) == 50
    with pytest.raises(UserError, match="a classifier needs at least two"):
        data.setup("fit")


def test_a_class_of_an_array_file_is_missing_from_its_labels_only(tmp_path):
    images = np.arange(6, dtype=np.uint8).repeat(16).reshape(6, 4, 4)
    labels = np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    chosen, renamed = pixels(ClassSubset(ArrayImages(str(tmp_path / "a.npz")), "0,2"), "test")
    assert chosen[:, 0, 0, 0].tolist() == [0, 2, 3, 5]
    assert renamed.tolist() == [0, 1, 0, 1]
