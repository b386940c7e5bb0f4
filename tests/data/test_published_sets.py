"""Sets of image files as they are published, made small."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from etflight.data import CUB200, GTSRB, TinyImageNet
from tests.data.refusals import assert_refused


def picture(file, value, size=(12, 10)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(file)


@pytest.fixture
def signs(tmp_path):
    """GTSRB as torchvision unpacks it: 3 training images of each class, 43 test images in another order; files of many sizes."""
    base = tmp_path / "gtsrb"
    for label in range(43):
        for track, frame in ((0, 0), (0, 1), (1, 0)):
            picture(base / f"GTSRB/Training/{label:05}/{track:05}_{frame:05}.ppm", label, (15 + label, 20 + 2 * frame))
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(43):
        picture(base / f"GTSRB/Final_Test/Images/{i:05}.ppm", 5 * i)
        rows.append(f"{i:05}.ppm;12;10;1;1;11;9;{(i * 7) % 43}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_gtsrb_is_read_as_torchvision_reads_it(signs):
    data = GTSRB(str(signs))
    data.setup()
    assert (data.num_classes, data.num_channels, len(set(data.class_names))) == (43, 3, 43)
    assert data.class_counts.tolist() == [3] * 43
    theirs, ours = datasets.GTSRB(str(signs), "test"), data.split("test")
    assert len(theirs) == len(ours) == 43
    for i, (picture, label) in enumerate(theirs):
        assert ours.labels[i] == label
        assert picture.getpixel((0, 0))[0] == 5 * int(ours.name(i)[-9:-4])
    images, labels = data.split("train").__getitems__([3, 128])
    assert images.shape == (2, 3, 32, 32)
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [1, 42]


def test_what_gtsrb_lacks_is_named(signs, monkeypatch):
    monkeypatch.setattr(GTSRB, "published", None)
    GTSRB(str(signs), download=True).prepare_data()  # all is there
    data, table = GTSRB(str(signs)), signs / "gtsrb/GT-final_test.csv"
    (signs / "gtsrb/GTSRB/Final_Test/Images/00007.ppm").unlink()
    assert_refused(data, "test", r"1 of 43 test images are missing: .*Final_Test/Images/00007\.ppm")
    for row, problem in (("../../../../x.ppm;1;3", "leaves the root"), ("00001.ppm;1;-3", "no path and label")):
        table.write_text(f"Filename;Width;ClassId\n{row}\n")
        assert_refused(data, "test", rf"GTSRB in .*: line 1 \(.*\) .*{problem}")
    table.unlink()
    assert_refused(data, "test", r"GT-final_test\.csv is missing: .*download=True")
    assert_refused(GTSRB(str(signs / "nowhere")), "fit", r"GTSRB/Training is missing: .*download=True")


WORDNET = {"n02124075": "Egyptian cat", "n04067472": "reel", "n01443537": "goldfish, Carassius auratus"}


@pytest.fixture
def tiny_imagenet(tmp_path, small):
    """As it is unpacked, with 3 classes of 4 training and 2 validation images."""
    small(TinyImageNet, 3, train=12, test=6)
    root = tmp_path / "tiny-imagenet-200"
    annotations = []
    for label, number in enumerate(WORDNET):
        for i in range(4):
            picture(root / f"train/{number}/images/{number}_{i}.JPEG", 60 * label + i, (64, 64))
        (root / f"train/{number}/{number}_boxes.txt").write_text("boxes")
        for i in range(2):
            name = f"val_{2 * label + i}.JPEG"
            picture(root / "val/images" / name, 60 * label, (64, 64))
            annotations.append(f"{name}\t{number}\t0\t32\t44\t62")
    (root / "wnids.txt").write_text("\n".join(WORDNET) + "\n")
    words = {**WORDNET, "n00001740": "entity"}
    (root / "words.txt").write_text("".join(f"{number}\t{name}\n" for number, name in words.items()))
    (root / "val/val_annotations.txt").write_text("\n".join(annotations) + "\n")
    picture(root / "test/images/test_0.JPEG", 0)
    return root


def test_tiny_imagenet_is_read_from_its_odd_layout(tiny_imagenet):
    data = TinyImageNet(str(tiny_imagenet))
    data.setup()
    assert data.class_names == ["goldfish", "Egyptian cat", "reel"]  # in the order of their numbers
    assert data.class_counts.tolist() == [4, 4, 4]
    assert data.split("test").labels.tolist() == [1, 1, 2, 2, 0, 0]
    assert not data.val_is_held_out
    images, _ = data.split("test").__getitems__([0, 5])
    assert images.shape == (2, 3, 64, 64)
    assert (images[:, 0, 5, 5] - torch.tensor([0, 120])).abs().max() <= 2
    (tiny_imagenet / "words.txt").write_text("n01443537\tcrane\nn02124075\tcat\nn04067472\tcrane, machine\n")
    assert TinyImageNet(str(tiny_imagenet)).class_names == ["crane n01443537", "cat", "crane n04067472"]
    (tiny_imagenet / "words.txt").unlink()
    assert TinyImageNet(str(tiny_imagenet)).class_names == sorted(WORDNET)


def test_what_tiny_imagenet_lacks_is_named(tiny_imagenet):
    data = TinyImageNet(str(tiny_imagenet))
    (tiny_imagenet / "val/images/val_3.JPEG").unlink()
    assert_refused(data, "test", r"1 of 6 test images are missing: .*val/images/val_3\.JPEG")
    (tiny_imagenet / "train/n04067472/images/n04067472_0.JPEG").unlink()
    assert_refused(data, "fit", "11 train images, but 12 were published")
    for line in ("val_0.JPEG\tn99999999\t0", "../../x.JPEG\tn02124075", "val_0.JPEG"):
        (tiny_imagenet / "val/val_annotations.txt").write_text(f"{line}\n")
        assert_refused(data, "test", r"TinyImageNet in .*: line 1 \(.*\) (is no path|leaves)")
    (tiny_imagenet / "wnids.txt").write_text("n02124075\n")
    assert_refused(data, "fit", "4 train images, but 12 were published")
    message = r"wnids\.txt cannot be read \(No such file.*\): unpack the set there"
    assert_refused(TinyImageNet("nowhere"), "fit", message)


@pytest.fixture
def birds(tmp_path, small):
    """CUB-200-2011 as it is unpacked, with 3 species of 6 images, every third to test."""
    small(CUB200, 3, train=12, test=6)
    root = tmp_path / "CUB_200_2011"
    files = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number in range(1, 19):
        label = (number - 1) // 6
        name = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")[label]
        picture(root / f"images/{name}/{name}_{number:04}.jpg", 80 * label + number, (40, 30))
        files["images"].append(f"{number} {name}/{name}_{number:04}.jpg")
        files["image_class_labels"].append(f"{number} {label + 1}")
        files["train_test_split"].append(f"{number} {int(number % 3 > 0)}")
    for name, lines in files.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_cub_is_read_from_its_three_lists(birds, train_a_step):
    data = CUB200(str(birds), image_size=32)
    data.setup()
    assert data.class_names == ["Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross"]
    assert data.class_counts.tolist() == [4, 4, 4]
    assert data.split("test").labels.tolist() == [0, 0, 1, 1, 2, 2]
    images, labels = data.split("train").__getitems__([0, 5, 11])
    numbers = (images[:, 0, 16, 16].int() - 80 * labels).tolist()
    assert np.abs(np.array(numbers) - [1, 8, 17]).max() <= 2
    long_tailed = CUB200(str(birds), image_size=32, imbalance_ratio=4)
    assert long_tailed.class_counts.tolist() == [4, 2, 1]
    train_a_step(long_tailed)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("train_test_split", "1 0", "11 train images, but 12 were published"),
        ("train_test_split", "77 1", "11 train images, but 12 were published"),
        ("image_class_labels", "1 7", r"CUB200 in .*: label 6 of train image .*0001\.jpg is outside 0 … 2"),
        ("image_class_labels", "1 one", r"CUB200 in .*: line 1 \(.*one'\) is no path and label"),
        ("image_class_labels", "77 1", "is no path and label"),
        ("images", "1 ../../secret.jpg", "leaves the root"),
        ("images", "1 001.x/none.jpg", r"1 of 12 train images are missing: .*images/001\.x/none\.jpg"),
        ("images", None, r"images\.txt cannot be read \(.*\): unpack the set there, or correct root"),
    ],
)
def test_lists_of_cub_that_do_not_fit_are_refused(birds, file, line, message):
    path = birds / f"{file}.txt"
    lines = path.read_text().splitlines()
    path.unlink() if line is None else path.write_text("\n".join([line, *lines[1:]]))
    assert_refused(CUB200(str(birds)), "fit", message)
