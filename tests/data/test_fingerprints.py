"""What tells one set of training images from another, and one choice of them; what a set is called."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from etflight.data import ArrayImages, Digits, FolderImages, INaturalist2018, ListImages
from etflight.data.profiles import fingerprint
from etflight.utils.fingerprints import choice_of, content_of
from tests.training import save_pictures


def pictures(root: Path, *names: str) -> Path:
    return save_pictures(root, *names, "test/cat/0.png", "test/dog/0.png")


NAMES = ("train/cat/a.png", "train/cat/b.png", "train/dog/a.png")


def of_folder(root: Path, **options) -> FolderImages:
    return FolderImages(str(root), image_size=4, **options)


def test_a_folder_is_known_by_names_and_labels_wherever_it_lies(tmp_path):
    one = of_folder(pictures(tmp_path / "one", *NAMES))
    shutil.copytree(tmp_path / "one", tmp_path / "moved/there")
    assert of_folder(tmp_path / "moved/there").fingerprint == one.fingerprint
    others = {
        "a name": [*NAMES[:-1], "train/dog/c.png"],
        "a class": ["train/cat/a.png", "train/cat/b.png", "train/eel/a.png"],
        "a label": ["train/cat/a.png", "train/dog/a.png", "train/dog/b.png"],
        "one more": [*NAMES, "train/dog/b.png"],
        "names that run on into each other": ["train/cat/a.png", "train/cat/b.pngtrain/dog/a.png", "train/dog/a.png"],
    }
    for name, files in others.items():
        assert of_folder(pictures(tmp_path / name, *files)).content != one.content, name


def test_images_in_memory_are_known_by_every_pixel_every_label_and_their_shape(arrays):
    path = arrays()
    with np.load(path) as content:
        images, labels = np.array(content["train_images"]), np.array(content["train_labels"])
    first = ArrayImages(path).content
    assert ArrayImages(arrays()).content == first
    pixel = images.copy()
    pixel[-1, -1, -1, -1] ^= 1
    turned = images.reshape(70, 4, 2, 3)
    for other in ({"train_images": pixel}, {"train_labels": labels[::-1]}, {"train_images": turned}):
        assert ArrayImages(arrays(**other)).content != first


def test_a_list_is_known_by_its_lines_whatever_folders_its_images_have_been_moved_to(tmp_path):
    lines = "cat/1.png 0\ncat/2.png 0\ndog/3.png 1\n"
    found = {}
    for place, names in (("as listed", ("cat/1.png", "cat/2.png", "dog/3.png")), ("flat", ("1.png", "2.png", "3.png"))):
        root = str(pictures(tmp_path / place, *names))
        for split in ("train", "test"):
            Path(root, f"{split}.txt").write_text(lines)
        data = ListImages(root, root, image_size=4)
        assert data.sample_name("train", 0) == f"{root}/{names[0]}"
        found[place] = data.content
    assert found["flat"] == found["as listed"]
    (tmp_path / "flat/train.txt").write_text(lines.replace("2.png 0", "2.png 1"))
    assert ListImages(str(tmp_path / "flat"), str(tmp_path / "flat"), check_files=False).content != found["flat"]


def test_choices_of_one_set_share_its_content_and_differ_in_the_rest():
    whole, tail, other = (Digits(), Digits(imbalance_ratio=20), Digits(imbalance_ratio=20, seed=1))
    assert len({data.content for data in (whole, tail, other)}) == 1
    assert len({data.fingerprint for data in (whole, tail, other)}) == 3
    for data in (whole, tail, other):
        assert data.fingerprint == f"{data.content}-{fingerprint(data.subset_indices)}"
        assert (content_of(data.fingerprint), choice_of(data.fingerprint)) == tuple(data.fingerprint.split("-"))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (Digits(), "Digits"),
        (ArrayImages("data/gtsrb32.npz"), "gtsrb32"),
        (FolderImages("photos/pets_v1.5/"), "pets_v1.5"),
        (FolderImages("photos/pets/../birds"), "birds"),
        (FolderImages("/"), "FolderImages"),
        (ListImages("signs", "lists"), "signs"),
        (INaturalist2018("inat", "lists"), "INaturalist2018"),
    ],
)
def test_a_set_of_ones_own_is_called_by_its_file_or_folder_a_published_one_by_its_name(data, name):
    assert data.dataset_name == name
