from pathlib import Path

import pytest
import torch
from PIL import Image

from etflight.data import ImageNetLT, INaturalist2018, ListImages, PlacesLT
from etflight.data.lists import read_list
from etflight.utils.errors import UserError
from tests.data.refusals import assert_refused


def write_list(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{path} {label}\n" for path, label in lines))


@pytest.fixture
def lists(tmp_path):
    """`lists(train=[(path, label), …], …)` writes lists and the images they name, one colour each: the label, and the place in the list."""

    def write(make_images=True, pattern="{}.txt", **splits):
        for split, lines in splits.items():
            write_list(tmp_path / "lists" / pattern.format(split), lines)
            for place, (path, label) in enumerate(lines if make_images else []):
                file = tmp_path / "images" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (9, 7), (label % 256, place, 0)).save(file, "PNG")
        return {"root": str(tmp_path / "images"), "lists": str(tmp_path / "lists"), "image_size": 8}

    return write


TRAIN = [("x/cat/0.png", 1), ("x/ant/1.png", 0), ("x/cat/2.png", 1), ("x/cat/3.png", 1), ("x/ant/4.png", 0)]
TEST = [("y/cat/0.png", 1), ("y/ant/1.png", 0)]


def test_a_list_is_read_in_its_order(lists, train_a_step):
    data = ListImages(**lists(train=TRAIN, test=TEST))
    data.setup()
    assert (data.num_classes, data.num_channels, data.class_names) == (2, 3, ["ant", "cat"])
    assert data.class_counts.tolist() == [2, 3]
    assert not data.val_is_held_out
    images, labels = next(iter(data.eval_dataloader("train")))
    assert labels.tolist() == [label for _, label in TRAIN]
    assert images[:, :2, 0, 0].tolist() == [[label, place] for place, (_, label) in enumerate(TRAIN)]
    assert data.sample_name("test", 1) == f"{data.root}/y/ant/1.png"
    train_a_step(data)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ({"train/n01/images": 0, "train/n02/images": 1}, ["n01", "n02"]),
        ({"n01/images/small": 0, "n02/images/small": 1}, ["n01", "n02"]),
        ({"train/cat/day1": 0, "train/cat/day2": 0, "train/dog/day1": 1}, ["cat", "dog"]),
        ({"train/cat": 0, "train/cat/new": 0, "train/dog/a/b": 1}, ["cat", "dog"]),
        ({"cars/red/x": 0, "cars/blue/x": 1, "boats/red/x": 2}, ["cars/red", "cars/blue", "boats/red"]),
        ({"all/cars/red": 0, "all/boats/red": 1}, ["cars", "boats"]),
        ({"images": 0, "more/images": 1}, ["images", "more/images"]),
        ({"day1/cat": 0, "day2/cat": 0, "day1/dog": 1}, ["0", "1"]),
    ],
    ids=lambda value: None if isinstance(value, list) else " ".join(value),
)
def test_a_class_is_called_by_the_part_of_the_path_that_tells_it_from_others(lists, folders, names):
    train = [(f"{folder}/{i}.png", label) for folder, label in folders.items() for i in range(2)]
    data = ListImages(**lists(train=train, test=train))
    data.setup()
    assert data.class_names == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("house cat\nthe ant\n", ["house cat", "the ant"]),
        ("house cat\nl'été\n", ["house cat", r"l'\udce9t\udce9"]),
        ("cat house cat\nant the ant\n", ["the ant", "house cat"]),
    ],
    ids=["in the order of the labels", "not in UTF-8", "beside their folders"],
)
def test_a_file_gives_the_names(lists, tmp_path, text, names):
    (tmp_path / "names.txt").write_bytes(text.encode("latin-1"))
    assert ListImages(**lists(train=TRAIN, test=TEST), names=str(tmp_path / "names.txt")).class_names == names


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\nb\nc\n", "has 3 names for 2 classes"),
        (None, r"cannot be read \(No such file.*: give the file of the names as names"),
    ],
)
def test_a_file_of_other_names_is_refused(lists, tmp_path, content, problem):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"names\.txt {problem}"):
        _ = ListImages(**lists(train=TRAIN, test=TEST), names=str(tmp_path / "names.txt")).class_names


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a.jpg", "is no path and label"),
        ("a.jpg -1", "is no path and label"),
        (" 7 ", "is no path and label"),
        ("a.jpg,7", "is no path and label"),
        ("a.jpg 10000000000", "is no path and label"),
        ("/etc/passwd 0", "leaves the root"),
        ("b/../../a.jpg 0", "leaves the root"),
    ],
)
def test_a_wrong_line_is_quoted_with_its_number(tmp_path, line, problem):
    (tmp_path / "list.txt").write_text(f"\nx/..y/a..jpg 3\n{line}\nz.jpg 1\n")
    with pytest.raises(UserError, match=rf"list\.txt: line 3 \(.*\) {problem}") as caught:
        read_list(tmp_path / "list.txt", "root")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a.jpg 0\n".encode("utf-16"), "is no text in UTF-8"),
        (b" \r\n\n", "names no image"),
        (None, r"cannot be read \(No such file or directory\): give the folder that holds the lists as lists"),
    ],
    ids=["utf-16", "empty", "missing"],
)
def test_what_is_no_list_is_refused(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"list\.txt {problem}"):
        read_list(tmp_path / "list.txt", "root")


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "with the mark with which Windows begins a text"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_are_read_line_by_line(tmp_path, mark, end):
    lines = ["a.jpg 0", "b/c d.jpg\t12", " ä/ö.png  3 ", "", "5 999999999", "x/7 8 \t 1\t", ""]
    (tmp_path / "list.txt").write_bytes((mark + end.join(lines)).encode())
    paths, labels = read_list(tmp_path / "list.txt", "root")
    assert paths.all_relative() == ["a.jpg", "b/c d.jpg", "ä/ö.png", "5", "x/7 8"]
    assert (labels.tolist(), labels.dtype) == ([0, 12, 3, 999_999_999, 1], torch.int64)


def test_a_label_beyond_the_classes_is_named_with_its_file(lists):
    data = ListImages(**lists(train=TRAIN, test=[TEST[0], ("y/ant/1.png", 2)]))
    assert_refused(data, "test", r"lists/test\.txt: label 2 of test image .*y/ant/1\.png is outside 0 … 1")
    data = ListImages(**lists(train=[*TRAIN[:4], ("x/ant/4.png", 900_000_000)], test=TEST))
    assert_refused(data, "fit", r"train\.txt: the largest label is 900000000, of 5 images")


def test_missing_images_are_counted_and_three_are_named_before_training(lists):
    files = lists(train=TRAIN, test=TEST, make_images=False)
    message = r"5 of 5 train images are missing: .*x/cat/0\.png, .*1\.png, .*2\.png and 2 more"
    assert_refused(ListImages(**files), "fit", message)
    ListImages(**files, check_files=False).setup("fit")
    lists(train=TRAIN)
    Path(files["root"], "x/cat/2.png").unlink()
    message = r"1 of 5 train images are missing: \S*images/x/cat/2\.png: put them there"
    assert_refused(ListImages(**files), "fit", message)


@pytest.mark.parametrize(
    ("there", "listed"),
    [
        (["val/cat/0.png", "val/ant/1.png"], ["val/0.png", "val/1.png"]),
        # ILSVRC's archive of validation images has no folders, but a published test list has
        (["val/0.png", "val/1.png"], ["val/cat/0.png", "val/ant/1.png"]),
    ],
)
def test_class_folders_that_a_list_or_the_disk_leaves_out_are_added_or_removed(lists, there, listed):
    files = lists(train=TRAIN, test=list(zip(there, (1, 0), strict=True)))
    write_list(Path(files["lists"]) / "test.txt", zip(listed, (1, 0), strict=True))
    data = ListImages(**files)
    data.setup("test")
    assert [data.sample_name("test", i) for i in (0, 1)] == [f"{data.root}/{path}" for path in there]
    write_list(Path(files["lists"]) / "test.txt", [("val/dog/9.png", 1)])  # not the class's folder
    assert_refused(ListImages(**files), "test", r"1 of 1 test images are missing: \S*val/dog/9\.png")


# --- the published sets, made small -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("set_class", "classes", "counts"),
    [
        (ImageNetLT, 1000, {"train": 115_846, "val": 20_000, "test": 50_000}),
        (PlacesLT, 365, {"train": 62_500, "val": 7_300, "test": 36_500}),
        (INaturalist2018, 8142, {"train": 437_513, "test": 24_426}),
    ],
)
def test_a_list_of_another_length_is_not_the_published_one(lists, set_class, classes, counts):
    data = set_class("nowhere", "nowhere")
    assert data.num_classes == classes
    assert data.val_is_held_out == ("val" in counts)
    for split, count in counts.items():
        name = set_class.list_files[split]
        data = set_class(**lists(pattern=name, **{split: TRAIN}))
        stage = {"train": "fit", "val": "validate", "test": "test"}[split]
        assert_refused(data, stage, rf"{name}: 5 {split} images, but {count:,} were published.*ListImages")


def test_imagenet_lt_has_its_own_validation_list_and_needs_only_the_test_list_to_test(lists, small):
    folders = ("n01440764", "n01443537")
    splits = {"train": ("train", [0, 1, 1]), "val": ("train", [0, 1]), "test": ("val", [0, 1])}
    named = {
        split: [(f"{place}/{folders[k]}/{split}_{i}.JPEG", k) for i, k in enumerate(labels)]
        for split, (place, labels) in splits.items()
    }
    imagenet = small(ImageNetLT, 2, train=3, val=2, test=2)
    for given in ({"test": named["test"]}, named):
        data = imagenet(**lists(pattern="ImageNet_LT_{}.txt", **given))
        data.setup("test")
        assert data.class_names == list(folders)
    assert data.val_is_held_out
    assert data.class_counts.tolist() == [1, 2]
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [3, 2, 2]


PLACES = {
    "easy format": ("train/airfield/00004851.jpg", "train/apartment_building-outdoor/1.jpg"),
    "as unpacked": ("data_256/a/airfield/00004851.jpg", "data_256/a/apartment_building/outdoor/1.jpg"),
}


@pytest.mark.parametrize("style", PLACES)
def test_both_styles_of_the_places_lists_give_the_same_classes(lists, small, style):
    train = [(path, label) for label, path in enumerate(PLACES[style])]
    data = small(PlacesLT, 2, train=2)(**lists(pattern="Places_LT_{}.txt", train=train))
    assert data.class_names == ["airfield", "apartment_building-outdoor"]
    assert data.class_counts.tolist() == [1, 1]


def test_the_validation_list_of_inaturalist_is_its_test_set(lists, small):
    named = [
        ("train_val2018/Plantae/1/a.jpg", 1),
        ("train_val2018/Aves/0/b.jpg", 0),
        ("train_val2018/Plantae/1/c.jpg", 1),
    ]
    files = lists(pattern="iNaturalist18_{}.txt", train=named, val=[("train_val2018/Aves/0/d.jpg", 0)])
    data = small(INaturalist2018, 2, train=3, test=1)(**files)
    data.setup()
    assert not data.val_is_held_out
    assert (data.class_names, data.class_counts.tolist()) == (["0", "1"], [1, 2])
    assert data.split("val") is data.split("test")
