"""Lists of image files that cannot be meant, before anything is trained: one line with the file, the place in it and the mend."""

import shutil

import pytest
from PIL import Image

TRAIN = "x/cat/0.png 1\nx/ant/1.png 0\nx/cat/2.png 1\nx/cat/3.png 1\nx/ant/4.png 0\n"
TEST = "y/cat/0.png 1\ny/ant/1.png 0\n"


@pytest.fixture
def lists(tmp_path):
    """`lists/train.txt` and `lists/test.txt`, and what they name in `images`."""
    (tmp_path / "lists").mkdir()
    for split, text in (("train", TRAIN), ("test", TEST)):
        (tmp_path / f"lists/{split}.txt").write_text(text)
        for line in text.splitlines():
            file = tmp_path / "images" / line.split()[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(file)
    return tmp_path / "lists"


def with_first_line(line):
    return lambda lists: (lists / "train.txt").write_text(f"{line}\n{TRAIN.partition(chr(10))[2]}")


def as_published(lists):
    (lists / "train.txt").rename(lists / "Places_LT_train.txt")


NO_PAIR = "is no path and label: give a path below the root, a blank and a number from 0 on"
# name: (what is done to the lists, the words of the line)
CASES = {
    "no list": (
        lambda lists: (lists / "train.txt").unlink(),
        ["lists/train.txt cannot be read (No such file or directory)", "give the folder that holds it as --data.lists"]),
    "another number of lines": (
        as_published, ["lists/Places_LT_train.txt has 5 images, but the published list has 62,500", "ListImages"]),
    "a label beyond the classes": (
        lambda lists: (lists / "test.txt").write_text("y/cat/0.png 1\ny/ant/1.png 7\n"),
        ["lists/test.txt: label 7 of test image images/y/ant/1.png is outside 0 … 1: correct it"]),
    "a label below 0": (with_first_line("x/cat/0.png -1"), ["lists/train.txt: line 1 ('x/cat/0.png -1')", NO_PAIR]),
    "a label that is no integer": (with_first_line("x/cat/0.png 1.0"), ["lists/train.txt: line 1 ('x/cat/0.png 1.0')", NO_PAIR]),
    "a label that is a word": (with_first_line("x/cat/0.png cat"), ["lists/train.txt: line 1 ('x/cat/0.png cat')", NO_PAIR]),
    "a label that is left out": (
        lambda lists: (lists / "train.txt").write_text(TRAIN.replace(" 1\n", " 2\n")),
        ["ListImages in images: class 1 (1) has no training image"]),
    "an absolute path": (with_first_line("/x/cat/0.png 1"), ["lists/train.txt: line 1", "leaves the root: give paths below it"]),
    "a path out of the root": (with_first_line("../0.png 1"), ["lists/train.txt: line 1", "leaves the root: give paths below it"]),
    "commas": (with_first_line("x/cat/0.png,1"), ["lists/train.txt: line 1 ('x/cat/0.png,1')", NO_PAIR]),
    "a head line": (with_first_line("path label"), ["lists/train.txt: line 1 ('path label')", NO_PAIR]),
    "labels first": (with_first_line("1 x/cat/0.png"), ["lists/train.txt: line 1 ('1 x/cat/0.png')", NO_PAIR]),
    "JSON": (with_first_line('{"images": ['), ["lists/train.txt: line 1 ('{\"images\": [')", NO_PAIR]),
    "backslashes": (with_first_line("x\\cat\\0.png 1"), ["lists/train.txt: line 1", "has a backslash: write folders as a/b.jpg"]),
    "UTF-16": (
        lambda lists: (lists / "train.txt").write_text(TRAIN, encoding="utf-16"),
        ["lists/train.txt is no text: give lines of a path below the root, a blank and a label, in UTF-8"]),
    "an image that is not there": (
        lambda lists: (lists.parent / "images/x/cat/2.png").unlink(),
        ["1 of 5 train images are missing: images/x/cat/2.png: put them there, or correct --data.root"]),
    "another root": (
        lambda lists: shutil.move(lists.parent / "images", lists.parent / "elsewhere"),
        ["5 of 5 train images are missing: images/x/cat/0.png, images/x/ant/1.png, images/x/cat/2.png and 2 more: put them there"]),
}  # fmt: skip


@pytest.mark.parametrize("command", ["describe", "fit"])
@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case, command, lists, etflight_command, tmp_path):
    spoil, words = CASES[case]
    spoil(lists)
    data = [
        "--data",
        "PlacesLT" if spoil is as_published else "ListImages",
        "--data.root",
        "images",
        "--data.lists",
        "lists",
    ]
    training = ["--model.head", "LinearHead", "--model.loss", "CrossEntropyLoss", "--trainer.accelerator", "cpu"]
    result = etflight_command(command, *data, *(training if command == "fit" else []), cwd=tmp_path)
    assert result.status == 1, result.err
    assert "Traceback" not in result.err + result.out
    (line,) = result.error_lines
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("*.ckpt"))
