"""`etflight predict`: decisions on images from anywhere, the same by two processes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from pyarrow import parquet

from etflight import Classifier
from etflight.cli.stages import main
from etflight.data import ArrayImages
from etflight.utils.errors import UserError
from tests import training
from tests.training import new_trainer, read_csv, save_arrays

QUIET = [*training.QUIET, "--trainer.logger", "false"]
NAMES = ["cat", "dog", "owl"]


def picture() -> Image.Image:
    """Larger than the model's images and not square."""
    small = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((40, 32))


def trained(folder: Path, channels: int) -> Path:
    path = folder / "train.npz"
    save_arrays(path, train=30, shape=(16, 20, channels), classes=3, class_names=np.array(NAMES))
    torch.manual_seed(0)
    trainer = new_trainer(max_epochs=1, limit_val_batches=0)
    model = Classifier(3, "resnet20_cifar", in_chans=channels)
    trainer.fit(model, datamodule=ArrayImages(str(path), mean=[0.3], std=[0.4], batch_size=15))
    model.temperature.fill_(0.2)
    trainer.save_checkpoint(folder / "m.ckpt")
    return folder / "m.ckpt"


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("rgb"), 3)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("grey"), 1)


def predict(checkpoint: Path, output: Path, *argv: object) -> None:
    main(["predict", "--ckpt_path", str(checkpoint), "--output", str(output), *map(str, argv), *QUIET])


def expected(checkpoint: Path, *pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and embeddings of uint8 `[H, W, C]` images of any size, prepared by Pillow."""
    model = Classifier.load_from_checkpoint(checkpoint).eval()
    fitted = []
    for image in pixels:
        opened = Image.fromarray(image.squeeze())
        scale = max(16 / opened.height, 20 / opened.width)
        width, height = int(opened.width * scale), int(opened.height * scale)
        left, top = round((width - 20) / 2), round((height - 16) / 2)
        small = opened.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 20, top + 16))
        fitted.append(np.atleast_3d(np.asarray(small)))
    images = (torch.tensor(np.stack(fitted)).permute(0, 3, 1, 2) / 255 - 0.3) / 0.4
    with torch.no_grad():
        return model.probabilities(images), model.embed(images)


def test_a_trial_run_leaves_no_table(rgb, tmp_path):
    picture().save(tmp_path / "one.png")
    predict(rgb, tmp_path / "table.csv", "--images", tmp_path / "one.png", "--trainer.fast_dev_run", "true")
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_and_size_is_brought_to_what_the_model_wants(rgb, grey, channels, tmp_path):
    """Some of them: all are decoded in tests/data/test_decoding.py."""
    checkpoint = {1: grey, 3: rgb}[channels]
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    modes = {"cmyk.jpg": "CMYK", "grey_alpha.png": "LA", "palette.png": "P", "rgb.png": "RGB"}
    files = {name: picture().convert(mode) for name, mode in modes.items()}
    for name, content in files.items():
        content.save(tmp_path / "pictures" / "below" / name, quality=100)
    predict(checkpoint, tmp_path / "out.csv", "--images", tmp_path / "pictures", "--top_k", 3)
    rows = read_csv(tmp_path / "out.csv")
    assert [Path(row["image"]).name for row in rows] == sorted(files)
    mode = "L" if channels == 1 else "RGB"
    probabilities, _ = expected(checkpoint, *(np.asarray(files[name].convert(mode)) for name in sorted(files)))
    for row, own in zip(rows, probabilities, strict=True):
        found = {row[f"class{k}"]: float(row[f"probability{k}"]) for k in ("", "_2", "_3")}
        assert list(found) == [NAMES[k] for k in own.argsort(descending=True)]
        assert [found[name] for name in NAMES] == pytest.approx(own.tolist(), abs=0.03), row["image"]
    assert not (tmp_path / "out_skipped.csv").exists()


def test_arrays_files_and_embeddings_in_every_format(rgb, grey, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (4, 16, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "four.npz", images=pixels)
    picture().save(tmp_path / "one.png")
    images = ["--images", tmp_path / "four.npz", tmp_path / "one.png", "--embeddings", "true", "--data.batch_size", 2]
    for suffix in ("csv", "npz", "parquet"):
        predict(rgb, tmp_path / f"out.{suffix}", *images)
    probabilities, embeddings = expected(rgb, *pixels)
    arrays = np.load(tmp_path / "out.npz")
    assert arrays["image"].tolist() == [*(f"{tmp_path / 'four.npz'}[{i}]" for i in range(4)), str(tmp_path / "one.png")]
    assert arrays["label"][:4, 0].tolist() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(arrays["probability"][:4, 0], probabilities.amax(1), rtol=1e-4)
    np.testing.assert_allclose(arrays["embedding"][:4], embeddings, atol=1e-5)
    rows, columns = read_csv(tmp_path / "out.csv"), parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert [row["class"] for row in rows] == columns["class"] == arrays["class"][:, 0].tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(columns["probability"], abs=1e-6)
    np.testing.assert_allclose(columns["embedding"], arrays["embedding"])
    assert float(rows[2]["embedding_63"]) == pytest.approx(float(embeddings[2, 63]), abs=1e-5)
    np.savez(tmp_path / "deep.npz", images=pixels.astype(np.uint16) * 257)  # 16 bits become 8
    predict(rgb, tmp_path / "deep_out.npz", "--images", tmp_path / "deep.npz", "--data.batch_size", 2)
    np.testing.assert_allclose(np.load(tmp_path / "deep_out.npz")["probability"], arrays["probability"][:4], rtol=1e-6)
    predict(grey, tmp_path / "grey.npz", "--images", tmp_path / "four.npz")
    probabilities, _ = expected(grey, *(np.asarray(Image.fromarray(image).convert("L")) for image in pixels))
    np.testing.assert_allclose(np.load(tmp_path / "grey.npz")["probability"][:, 0], probabilities.amax(1), atol=0.03)


def test_what_cannot_be_read_is_skipped_and_listed(rgb, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a.png", "e.png"):
        picture().save(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "c.txt").write_text("notes")
    (folder / "d.jpg").touch()
    (folder / ".hidden").touch()
    predict(rgb, tmp_path / "out.csv", "--images", folder, "--data.batch_size", 2)
    assert [Path(row["image"]).name for row in read_csv(tmp_path / "out.csv")] == ["a.png", "e.png"]
    skipped = read_csv(tmp_path / "out_skipped.csv")
    assert [Path(row["image"]).name for row in skipped] == ["b.png", "c.txt", "d.jpg"]
    assert all("cannot be read as an image" in row["reason"] for row in skipped)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "could not be read" in line]
    assert told.startswith("etflight: warning: 3 images could not be read")
    assert "c.txt" in told


def test_images_of_12_bits_that_are_stored_in_16_are_told_of(grey, tmp_path, capsys):
    pixels = np.arange(16 * 20, dtype=np.uint16).reshape(16, 20) * 12
    Image.fromarray(pixels).save(tmp_path / "one.png")
    np.savez(tmp_path / "more.npz", images=pixels[None])
    predict(grey, tmp_path / "p.csv", "--images", tmp_path / "one.png", tmp_path / "more.npz")
    told = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "images of 16 bits is 3828, of which 8 bits keep 16 levels" in line
    ]
    assert len(told) == 2  # of the file, and of the array


class Meanwhile(Callback):
    """Another process that writes the file while this one predicts."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_predict_batch_end(self, *_):
        self.path.write_text("theirs")


def test_of_two_predictions_into_one_file_at_once_the_second_is_refused(rgb, tmp_path):
    picture().save(image := tmp_path / "one.png")
    output = tmp_path / "out.csv"
    other = [f"--trainer.callbacks+={__name__}.Meanwhile", "--trainer.callbacks.path", output]
    with pytest.raises(UserError, match=r"out\.csv exists already and stays as it is: give another name"):
        predict(rgb, output, "--images", image, *other)
    assert output.read_text() == "theirs"


def test_a_prediction_that_failed_does_not_keep_others_from_the_file(rgb, tmp_path):
    picture().save(image := tmp_path / "one.png")
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        predict(rgb, tmp_path / "out.csv", "--images", tmp_path / "broken.png")
    predict(rgb, tmp_path / "out.csv", "--images", image)
    assert len(read_csv(tmp_path / "out.csv")) == 1


@pytest.mark.parametrize(
    ("images", "output", "reason"),
    [
        (["nothing_here"], "out.csv", "nothing_here does not exist"),
        (["empty"], "out.csv", "there is no image"),
        (["five.npz"], "out.csv", "5 channels, but the model takes 3"),
        (["text"], "out.csv", "none of the 1 images can be read: .*cannot be read as an image"),
        (["floats.npz"], "out.csv", "give uint8 or uint16"),
        (["several.npz"], "out.csv", "images is missing; it holds one, two"),
        (["one.png", "--top_k", "4"], "out.csv", "--top_k 4: the model has 3 classes"),
        (["one.png"], "there.csv/out.csv", "folder there.csv cannot be written to .*another --output"),
        (["one.png"], "there.csv", "exists already"),
        (["one.png"], "out.xlsx", r"ends in .csv, .parquet, .npz"),
    ],
)
def test_bad_input_is_one_line(rgb, images, output, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("one.png")
    for name in ("empty", "text"):
        Path(name).mkdir()
    Path("text/notes.txt").write_text("notes")
    Path("there.csv").write_text("mine")
    np.savez("five.npz", images=np.zeros((2, 4, 4, 5), np.uint8))
    np.savez("floats.npz", images=np.zeros((2, 4, 4)))
    np.savez("several.npz", one=np.zeros(2), two=np.zeros(2))
    with pytest.raises(UserError, match=reason) as raised:
        predict(rgb, Path(output), "--images", *images)
    assert "\n" not in str(raised.value)
    assert Path("there.csv").read_text() == "mine"
    assert not Path("out.csv").exists()


def test_a_checkpoint_that_does_not_know_its_images_is_told_of_them(rgb, tmp_path):
    saved = torch.load(rgb, weights_only=True)
    del saved["preprocessing"]
    torch.save(saved, tmp_path / "old.ckpt")
    picture().save(tmp_path / "one.png")
    images = ["--images", tmp_path / "one.png"]
    with pytest.raises(UserError, match=r"give --data\.input_size"):
        predict(tmp_path / "old.ckpt", tmp_path / "out.csv", *images)
    told = ["--data.input_size", "[3, 16, 20]", "--data.mean", "[0.3]", "--data.std", "[0.4]"]
    predict(tmp_path / "old.ckpt", tmp_path / "out.csv", *images, *told)
    predict(rgb, tmp_path / "new.csv", *images)
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "new.csv").read_text()


def test_images_may_stand_in_a_configuration_file_or_behind_an_equals_sign(rgb, tmp_path):
    """In place of the file's own data set, as on the command line, which comes first."""
    for name, angle in (("one.png", 0), ("two.png", 180)):
        picture().rotate(angle).save(tmp_path / name)
    one, two = (str(tmp_path / name) for name in ("one.png", "two.png"))
    data = {"class_path": "Digits", "init_args": {"val_fraction": 0.1, "batch_size": 7}}
    (tmp_path / "list.yaml").write_text(json.dumps({"images": [two], "data": data}))
    given = {
        "flag": ["--images", two],
        "equals": [f"--images={two}"],
        "list": ["-c", tmp_path / "list.yaml"],
        "both": ["-c", tmp_path / "list.yaml", "--images", one],
        "run": ["-c", tmp_path / "list.yaml", "--data.batch_size", 1, "--images", one, two],
    }
    for name, argv in given.items():
        predict(rgb, tmp_path / f"{name}.npz", *argv)
    found = {name: dict(np.load(tmp_path / f"{name}.npz")) for name in given}
    for name in ("equals", "list"):
        assert found[name]["image"].tolist() == [two]
        assert found[name]["probability"] == found["flag"]["probability"]
    assert found["both"]["image"].tolist() == [one]
    assert found["run"]["image"].tolist() == [one, two]
    with pytest.raises(UserError, match="not both"):
        predict(rgb, tmp_path / "out.csv", *given["list"], "--data", "Digits")
    (tmp_path / "text.yaml").write_text(json.dumps({"images": str(two)}))
    with pytest.raises(UserError, match=r"give a list, as in images: \[photos/\]"):
        predict(rgb, tmp_path / "out.csv", "-c", tmp_path / "text.yaml")


def test_it_says_where_the_temperature_comes_from(rgb, tmp_path, caplog):
    picture().save(tmp_path / "one.png")
    saved = torch.load(rgb, weights_only=True)
    for kind, told in (("fitted", "temperature 0.2, fitted"), ("default", "temperature 0.2, the default")):
        path = tmp_path / f"{kind}.ckpt"
        torch.save({**saved, "temperature": kind}, path)
        caplog.clear()
        predict(path, tmp_path / f"{path.stem}.csv", "--images", tmp_path / "one.png")
        (line,) = [message for message in caplog.messages if message.startswith("predictions:")]
        assert told in line


# --- two processes -----------------------------------------------------------------------------------------------------

TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
UNREADABLE = (0, 3, 4, 10)  # both ranks' images, the first and the last among them


def predict_together(rank: int, folder: Path, argv: list[str]) -> None:
    os.chdir(folder)
    try:
        main([*argv, *QUIET, *TWO])
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eleven files, an odd number also of readable ones, each another picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(11):
        picture().rotate(31 * i).save(folder / f"{i:02}.png")
        if i in UNREADABLE:
            (folder / f"{i:02}.png").write_bytes(b"no image")
    return folder


def with_numbers(path: Path) -> list[dict[str, object]]:
    """The rows of a file of predictions, with their probabilities and embeddings as numbers."""
    numbers = ("probability", "embedding")
    return [{k: float(v) if k.startswith(numbers) else v for k, v in row.items()} for row in read_csv(path)]


def test_two_processes_write_every_image_once_and_in_order(rgb, pictures, two_ready_processes, tmp_path):
    argv = [
        "predict", "--ckpt_path", str(rgb), "--images", str(pictures), "--top_k", "2", "--embeddings", "true",
        "--data.batch_size", "3", "--output",
    ]  # fmt: skip
    main([*argv, str(tmp_path / "one.csv"), *QUIET])
    two_ready_processes(predict_together, [(tmp_path, [*argv, str(tmp_path / "two.csv")])] * 2)
    names = [str(pictures / f"{i:02}.png") for i in range(11)]
    one, two = (with_numbers(tmp_path / f"{name}.csv") for name in ("one", "two"))
    assert [row["image"] for row in two] == [name for i, name in enumerate(names) if i not in UNREADABLE]
    assert two == [pytest.approx(row, abs=2e-6) for row in one]
    skipped = read_csv(tmp_path / "two_skipped.csv")
    assert [row["image"] for row in skipped] == [names[i] for i in UNREADABLE]
    assert skipped == read_csv(tmp_path / "one_skipped.csv")


def refusal_of_both(rank: int, folder: Path, argv: list[str]) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        predict_together(rank, folder, argv)
    return str(raised.value)


def test_images_of_which_none_can_be_read_end_both_processes_alike(rgb, two_ready_processes, tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"no image")
    argv = ["predict", "--ckpt_path", str(rgb), "--images", "bad", "--output", "out.csv"]
    first, second = two_ready_processes(refusal_of_both, [(tmp_path, argv)] * 2)
    assert first == second
    assert first.startswith("none of the 3 images can be read")
    assert not (tmp_path / "out.csv").exists()
