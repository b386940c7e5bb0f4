import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etflight.data import FolderImages
from etflight.utils.errors import UserError
from tests.data.refusals import assert_refused
from tests.training import save_folders


@pytest.fixture
def tree(tmp_path):
    """Higher than wide."""
    return save_folders(tmp_path, (8, 12), train={"dog": 3, "cat": 4}, test={"dog": 2, "cat": 1})


def test_classes_are_the_sorted_folders_of_train(tree, train_a_step):
    data = FolderImages(str(tree), image_size=8)
    data.setup()
    assert (data.class_names, data.num_classes, data.num_channels) == (["cat", "dog"], 2, 3)
    assert data.class_counts.tolist() == [4, 3]
    assert data.sample_name("test", 1) == str(tree / "test" / "dog" / "0.png")
    train_a_step(data)


def test_images_are_resized_by_the_shorter_side_and_cropped_in_the_middle(tree):
    rows = np.repeat(20 * np.arange(12, dtype=np.uint8), 8).reshape(12, 8)
    Image.fromarray(rows).save(tree / "test" / "cat" / "0.png")
    images, labels = next(iter(FolderImages(str(tree), image_size=8).test_dataloader()))
    assert (images.shape, images.dtype, labels.tolist()) == ((3, 3, 8, 8), torch.uint8, [0, 1, 1])
    assert np.array_equal(images[0, 0], rows[2:10])


def test_any_file_is_read_as_a_test_image_is(tree, tmp_path):
    data = FolderImages(str(tree), image_size=4)
    batch = next(iter(data.test_dataloader()))
    elsewhere = [Path(data.sample_name("test", i)).rename(tmp_path / f"{i}.png") for i in (0, 2)]
    assert torch.equal(data.read(*elsewhere), data.eval_transform(batch)[0][[0, 2]])
    with pytest.raises(UserError, match=r"none\.png"):
        data.read(tmp_path / "none.png")


def test_hidden_files_and_folders_and_other_types_are_passed_over(tree):
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "cat" / "._0.png").write_text("")
    (tree / "train" / "cat" / "notes.txt").write_text("")
    data = FolderImages(str(tree))
    assert data.class_counts.tolist() == [4, 3]


def test_a_folder_val_is_the_validation_split(tree):
    assert not FolderImages(str(tree)).val_is_held_out
    (tree / "test").rename(tree / "val")
    data = FolderImages(str(tree))
    data.setup("fit")
    assert data.val_is_held_out
    assert data.split("val").labels.tolist() == [0, 1, 1]
    assert_refused(data, "test", r"test does not exist: put train/<class>/\*.jpg")


@pytest.mark.parametrize(
    ("folder", "stage", "message"),
    [
        ("elsewhere", "fit", r"x/train does not exist: put train/<class>"),
        ("x/train/emu", "fit", "train holds no image"),
        ("x/train", "fit", "x/train holds no class folder"),
        ("x/test/emu", "test", "x/train does not exist"),
    ],
)
def test_what_the_layout_lacks_is_named(tmp_path, folder, stage, message):
    (tmp_path / folder).mkdir(parents=True)
    assert_refused(FolderImages(str(tmp_path / "x")), stage, message)


def test_a_class_without_images_or_unknown_to_train_is_named(tree):
    (tree / "test" / "emu").mkdir()
    assert_refused(FolderImages(str(tree)), "test", "test/emu: no class of train has this name")
    (tree / "train" / "emu").mkdir()
    assert_refused(FolderImages(str(tree)), "fit", r"class 2 \(emu\) has no training image")


@pytest.mark.parametrize("held_out", ["val_fraction", "val"])
def test_a_training_that_reads_no_test_image_yet_compares_the_class_folders_of_test(tree, held_out, capsys):
    if held_out == "val":
        save_folders(tree, val={"dog": 2, "cat": 1})
    options = {"val_fraction": 0.3} if held_out == "val_fraction" else {}
    FolderImages(str(tree), **options).setup("fit")
    assert "no image" not in capsys.readouterr().err
    save_folders(tree, test={"emu": 1})
    assert_refused(FolderImages(str(tree), **options), "fit", "test/emu: no class of train has this name: rename it")
    save_folders(tree, train={"emu": 3}, val={"emu": 1}) if held_out == "val" else save_folders(tree, train={"emu": 3})
    shutil.rmtree(tree / "test/cat")
    shutil.rmtree(tree / "test/dog")
    FolderImages(str(tree), **options).setup("fit")
    warned = capsys.readouterr().err
    assert f"warning: FolderImages in {tree}: test has no image of cat, dog, 2 of 3 classes: " in warned
    assert warned.count("no image") == 1
    shutil.rmtree(tree / "test")
    FolderImages(str(tree), **options).setup("fit")  # the test images may come later
    assert "no image" not in capsys.readouterr().err


def test_a_training_warns_of_classes_whose_folder_in_test_is_empty_once_it_watches_test(tree, capsys):
    (tree / "test/cat/0.png").unlink()
    data = FolderImages(str(tree))
    data.setup("fit")
    data.setup("fit")
    assert capsys.readouterr().err.count("test has no image of cat, 1 of 2 classes") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_even_from_a_worker(tree, workers):
    (tree / "train/cat/2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"train/cat/2\.png cannot be read as an image"):
        list(FolderImages(str(tree), image_size=4, num_workers=workers).train_dataloader())


def drawn(data):
    """The files of the training and of the test, below the folder."""
    return [{data.sample_name(split, i) for i in range(len(data.split(split)))} for split in ("train", "test")]


def test_a_folder_of_classes_alone_is_divided_by_class_and_by_nothing_but_names(tmp_path):
    sizes = {"ant": 1, "bee": 2, "cat": 10, "dog": 21}
    save_folders(tmp_path / "a", **{".": sizes})
    train, test = drawn(data := FolderImages(str(tmp_path / "a"), image_size=8))
    assert data.class_names == ["ant", "bee", "cat", "dog"]
    assert np.bincount(data.split("test").labels).tolist() == [0, 1, 2, 4]
    assert np.bincount(data.split("train").labels).tolist() == [1, 1, 8, 17]
    assert not train & test
    assert train | test == {str(path) for path in (tmp_path / "a").rglob("*.png")}
    assert drawn(FolderImages(str(tmp_path / "a"), seed=3)) == [train, test]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    elsewhere = drawn(FolderImages(str(tmp_path / "b")))
    assert [{name.replace("/b/", "/a/") for name in names} for names in elsewhere] == [train, test]
    half = FolderImages(str(tmp_path / "a"), test_fraction=0.5)
    assert np.bincount(half.split("test").labels).tolist() == [0, 1, 5, 10]


def test_the_division_is_told_in_one_line_with_the_classes_that_no_test_image_is_left_for(tmp_path, caplog, capsys):
    save_folders(tmp_path, **{".": {"ant": 1, "bee": 5, "cat": 5}})
    with caplog.at_level("INFO"):
        FolderImages(str(tmp_path), val_fraction=0.3).setup("fit")
    (line,) = [text for text in caplog.messages if "test_fraction" in text]
    assert "0.2 of each class's images, chosen by their names, are test images" in line
    assert "test has no image of ant, 1 of 3 classes" in capsys.readouterr().err


def test_folders_of_splits_under_other_names_are_no_classes(tmp_path):
    save_folders(tmp_path, Training={"dog": 2, "cat": 2}, Testing={"dog": 2, "cat": 2})
    assert_refused(FolderImages(str(tmp_path)), "fit", r"train does not exist: put train/<class>/\*.jpg")


@pytest.mark.parametrize("part", [0, 1])
def test_a_division_without_training_or_test_images_is_refused(tmp_path, part):
    with pytest.raises(UserError, match=r"test_fraction is .: give a part above 0 and below 1"):
        FolderImages(str(tmp_path), test_fraction=part)
