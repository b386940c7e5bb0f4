"""The script that makes the sets of two configurations, on small files in the layout of the public archives; nothing is downloaded."""

import numpy as np
import pytest
from PIL import Image

from etflight.data import ArrayImages
from notebooks.prepare_sets import ALPHABETS, gtsrb, omniglot


def draw(path, value, mode, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def archives(tmp_path):
    """A folder with two tracks of each of three signs, five test images, and two characters of each alphabet and of one more."""
    final = tmp_path / "gtsrb/GTSRB"
    for label in range(3):
        frames = final / f"Final_Training/Images/{label:05}"
        for track, frame in np.ndindex(2, 30):
            draw(frames / f"{track:05}_{frame:05}.ppm", (label, track, frame), "RGB", (20, 25))
        (frames / f"GT-{label:05}.csv").write_text("Filename;Width")
    for i in range(5):
        draw(final / f"Final_Test/Images/{i:05}.ppm", (100 + i,) * 3, "RGB", (40, 30))
    lines = "".join(f"{i:05}.ppm;40;30;5;5;35;25;{i % 3}\n" for i in range(5))
    (tmp_path / "gtsrb/GT-final_test.csv").write_text(
        f"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n{lines}"
    )
    for alphabet in (*ALPHABETS, "Armenian"):
        for character, drawing in np.ndindex(2, 20):
            file = f"omniglot-py/images_background/{alphabet}/character{character + 1:02}/0001_{drawing + 1:02}.png"
            draw(tmp_path / file, 255 - drawing, "L", (105, 105))
    return tmp_path


def test_signs_are_every_fifth_frame_and_every_second_test_image(archives):
    gtsrb(archives)
    arrays = np.load(archives / "gtsrb32.npz", allow_pickle=False)
    kept = [(label, track, frame) for label in range(3) for track in range(2) for frame in (4, 9, 14, 19, 24, 29)]
    assert arrays["train_images"].shape == (36, 32, 32, 3)
    assert [tuple(image[0, 0]) for image in arrays["train_images"]] == kept
    assert arrays["train_labels"].tolist() == [label for label, _, _ in kept]
    assert arrays["test_images"][:, 5, 5, 0].tolist() == [100, 102, 104]
    assert arrays["test_labels"].tolist() == [0, 2, 1]
    assert ArrayImages(str(archives / "gtsrb32.npz")).class_names[2] == "speed limit 50"


def test_characters_are_white_on_black_and_15_drawings_train(archives):
    omniglot(archives)
    data = ArrayImages(str(archives / "omniglot.npz"))
    assert data.num_classes == 16
    assert data.class_names[6:8] == ["Japanese_(katakana)/character01", "Japanese_(katakana)/character02"]
    arrays = np.load(archives / "omniglot.npz", allow_pickle=False)
    assert arrays["train_images"].shape == (240, 28, 28, 1)
    assert arrays["train_images"][:15, 3, 3, 0].tolist() == list(range(15))
    assert arrays["test_images"][-5:, 3, 3, 0].tolist() == list(range(15, 20))
    assert arrays["test_labels"].tolist() == [label for label in range(16) for _ in range(5)]
