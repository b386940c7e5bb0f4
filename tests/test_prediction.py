"""`etflight.load` and `predict`: the numbers of the command line, from everything that holds a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import etflight
from etflight.cli.stages import main
from etflight.data.preprocessing import Preprocessing
from tests.training import QUIET

NAMES = ["cat", "dog", "owl"]


def saved(folder: Path, channels: int, names: list[str] | None = NAMES) -> Path:
    """An untrained model with a temperature, as a trainer would save it."""
    torch.manual_seed(0)
    model = etflight.Classifier(3, "resnet20_cifar", in_chans=channels)
    model.class_names, model.temperature[()] = names, 0.2
    model.preprocessing = Preprocessing((channels, 16, 20), (0.3,) * channels, (0.4,) * channels, crop_pct=0.9)
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.6"}
    model.on_save_checkpoint(checkpoint)
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("rgb"), 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of several modes, larger than the model's images and not square."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    for i, mode in enumerate(("RGB", "L", "LA", "P", "RGBA", "1")):
        Image.fromarray(pixels).resize((40, 32)).rotate(30 * i).convert(mode).save(folder / f"{i}.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.fromarray(pixels).resize((40, 32)).save(folder / "6.png", exif=turned)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_numbers_are_those_of_the_command_on_the_same_files(channels, pictures, tmp_path):
    checkpoint = saved(tmp_path / "run", channels)
    table = tmp_path / "out.npz"
    main([
        "predict", f"--ckpt_path={checkpoint}", f"--images={pictures[0].parent}", f"--output={table}", "--top_k=2",
        *QUIET, "--trainer.logger=false",
    ])  # fmt: skip
    expected = np.load(table)
    for run in (checkpoint, tmp_path / "run"):
        names, probabilities, labels = etflight.load(run).predict(pictures, top_k=2)
        assert names == expected["class"].tolist()
        assert np.array_equal(probabilities, expected["probability"])
        assert np.array_equal(labels, expected["label"])


def test_every_form_of_a_picture_is_the_same_picture(rgb, pictures):
    model = etflight.load(rgb)
    expected = model.predict(pictures, top_k=3).probabilities
    opened = [Image.open(path) for path in pictures]
    upright = [Image.open(path).convert("RGB") for path in pictures[:6]]
    batch = np.stack([np.asarray(picture) for picture in upright])  # [B, H, W, C]
    forms = {
        "paths as text": map(str, pictures),
        "Pillow's": opened,
        "arrays": list(batch),
        "tensors and paths": [*map(torch.tensor, batch[:3]), *pictures[3:6]],
        "a batch": torch.tensor(batch).permute(0, 3, 1, 2),
        "a batch as an array": batch.transpose(0, 3, 1, 2),
    }
    for name, form in forms.items():
        found = model.predict(form, top_k=3).probabilities
        assert torch.equal(found, expected[: len(found)]), name
        assert len(found) >= 6
    for one in (pictures[1], str(pictures[1]), opened[1], np.asarray(opened[1])):  # grey: [H, W]
        torch.testing.assert_close(model.predict(one, top_k=3).probabilities, expected[1:2])
    few = model.predict(pictures, top_k=3, batch_size=2).probabilities
    torch.testing.assert_close(few, expected)


def test_predicting_leaves_the_modes_as_they_were(rgb, pictures):
    model = etflight.load(rgb)
    assert not model.training
    expected = model.predict(pictures).probabilities
    model.train()
    model.backbone.eval()
    assert torch.equal(model.predict(pictures).probabilities, expected)
    assert model.head.training
    assert not model.backbone.training


def test_without_class_names_the_labels_are_the_names(tmp_path, pictures):
    found = etflight.load(saved(tmp_path, 3, names=None)).predict(pictures, top_k=3)
    assert found.names == [list(map(str, row)) for row in found.labels.tolist()]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], ["no image"]),
        ("nothing.png", ["nothing.png"]),
        (__file__, [__file__, "cannot be read as an image"]),
        (str(Path(__file__).parent), ["is a folder"]),
        (np.zeros((2, 3, 16, 20)), ["float64", "give uint8"]),
        (np.zeros((2, 16, 20, 3), np.uint8), ["[B, C, H, W]", "16 channels", "takes 3"]),
        (torch.zeros(5, 16, 20, dtype=torch.uint8), ["[H, W, C]", "20 channels"]),
        ([np.zeros(3, np.uint8)], ["image 0", "[3]", "[H, W, C]"]),
        (Image.new("F", (20, 16)), ["32 bits"]),
    ],
)
def test_what_is_no_picture_for_the_model_is_named_in_one_line(images, words, rgb):
    with pytest.raises(etflight.utils.errors.UserError) as raised:
        etflight.load(rgb).predict(images)
    assert not [word for word in words if word not in str(raised.value)], raised.value
    assert "\n" not in str(raised.value)


def test_what_is_no_model_or_cannot_predict_is_refused_in_one_line(rgb, pictures, tmp_path):
    for path in (pictures[0].parent, tmp_path / "nowhere", pictures[0]):
        with pytest.raises(etflight.utils.errors.UserError, match=str(path)):
            etflight.load(path)
    model = etflight.load(rgb)
    for argument in ({"top_k": 4}, {"top_k": 0}, {"batch_size": 0}):
        with pytest.raises(etflight.utils.errors.UserError, match=next(iter(argument))):
            model.predict(pictures, **argument)
    model.temperature.fill_(float("nan"))
    with pytest.raises(etflight.utils.errors.UserError, match="7 of 7 images are NaN"):
        model.predict(pictures)
    model.preprocessing = None
    with pytest.raises(etflight.utils.errors.UserError, match="does not know how its images were prepared"):
        model.predict(pictures)
