"""Sets of image files as they are published, made small."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from etflight.data import CUB200, GTSRB, TinyImageNet
from etflight.utils.errors import UserError


def picture(file, value, size=(12, 10)):
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = {".ppm": "PPM", ".jpg": "JPEG", ".JPEG": "JPEG"}[file.suffix]
    Image.new("RGB", size, (value, value, value)).save(file, kind)


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
    (signs / "gtsrb/GTSRB/Final_Test/Images/00007.ppm").unlink()
    with pytest.raises(UserError, match=r"1 of 43 test images are missing: .*Final_Test/Images/00007\.ppm"):
        GTSRB(str(signs)).setup("test")
    table = signs / "gtsrb/GT-final_test.csv"
    for row, problem in (
        ("../../x.ppm;1;1;1;1;1;1;3", r"file '\.\./\.\./x\.ppm'"),
        ("00001.ppm;1;1;1;1;1;1;-3", "class '-3'"),
    ):
        table.write_text(table.read_text().partition("\n")[0] + f"\n{row}\n")
        with pytest.raises(UserError, match=rf"GT-final_test\.csv has a line with .*{problem}"):
            GTSRB(str(signs)).setup("test")
    table.unlink()
    with pytest.raises(UserError, match=r"GT-final_test\.csv is missing: .*--data.download true"):
        GTSRB(str(signs)).setup("test")
    with pytest.raises(UserError, match=r"no train image is there: .*--data.download true"):
        GTSRB(str(signs / "nowhere")).setup("fit")


WORDNET = {"n02124075": "Egyptian cat", "n04067472": "reel", "n01443537": "goldfish, Carassius auratus"}


@pytest.fixture
def tiny_imagenet(tmp_path, monkeypatch):
    """As it is unpacked, with 3 classes of 4 training and 2 validation images."""
    monkeypatch.setattr(TinyImageNet, "published_classes", 3)
    monkeypatch.setattr(TinyImageNet, "published_counts", {"train": 12, "test": 6})
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
    (root / "words.txt").write_text(
        "".join(f"{number}\t{words}\n" for number, words in {**WORDNET, "n00001740": "entity"}.items())
    )
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
    (tiny_imagenet / "words.txt").unlink()
    assert TinyImageNet(str(tiny_imagenet)).class_names == sorted(WORDNET)


def test_what_tiny_imagenet_lacks_is_named(tiny_imagenet):
    (tiny_imagenet / "val/images/val_3.JPEG").unlink()
    with pytest.raises(UserError, match=r"1 of 6 test images are missing: .*val/images/val_3\.JPEG"):
        TinyImageNet(str(tiny_imagenet)).setup("test")
    (tiny_imagenet / "train/n04067472/images/n04067472_0.JPEG").unlink()
    with pytest.raises(UserError, match="11 train images, but 12 were published"):
        TinyImageNet(str(tiny_imagenet)).setup("fit")
    annotations = tiny_imagenet / "val/val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn99999999\t0\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt has a line that begins \['val_0\.JPEG', 'n99999999'\]"):
        TinyImageNet(str(tiny_imagenet)).setup("test")
    (tiny_imagenet / "wnids.txt").write_text("n02124075\n")
    with pytest.raises(UserError, match=r"wnids\.txt does not name 3 classes"):
        TinyImageNet(str(tiny_imagenet)).setup("fit")
    with pytest.raises(
        UserError, match=r"nowhere/wnids\.txt cannot be read \(No such file or directory\): unpack the set there"
    ):
        TinyImageNet("nowhere").setup("fit")


@pytest.fixture
def birds(tmp_path, monkeypatch):
    """CUB-200-2011 as it is unpacked, with 3 species of 6 images, every third to test."""
    monkeypatch.setattr(CUB200, "published_classes", 3)
    monkeypatch.setattr(CUB200, "published_counts", {"train": 12, "test": 6})
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
        ("image_class_labels", "1 7", r"image_class_labels\.txt: label 6 of train image .*0001\.jpg is outside 0 … 2"),
        ("image_class_labels", "1 one", "image 1 has label 'one'"),
        ("train_test_split", "1 2", "image 1 has label '1' and split '2'"),
        ("train_test_split", "77 1", "differ in their images"),
        ("images", "1 ../secret.jpg", r"'\.\./secret\.jpg', which leaves the folder"),
        ("images", "1 001.x/none.jpg", r"1 of 12 train images are missing: .*images/001\.x/none\.jpg"),
    ],
)
def test_lists_of_cub_that_do_not_fit_are_refused(birds, file, line, message):
    path = birds / f"{file}.txt"
    path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]))
    with pytest.raises(UserError, match=message) as caught:
        CUB200(str(birds)).setup("fit")
    assert "\n" not in str(caught.value)


def test_a_missing_list_of_cub_is_named(birds):
    (birds / "images.txt").unlink()
    with pytest.raises(
        UserError, match=r"images\.txt cannot be read \(.*\): unpack the set there, or correct --data\.root"
    ):
        CUB200(str(birds)).setup("fit")
