"""Files, classes and runs may be called anything that a disk takes."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from etflight import Classifier
from etflight.cli import collapse, describe, export
from etflight.cli.stages import main
from etflight.utils.terminal import readable
from etflight.utils.yaml import load_yaml, to_yaml
from tests.training import QUIET, read_csv, save_folders, save_pictures

NO_TEXT = os.fsdecode(b"caf\xe9")  # the bytes of Latin-1
NAMES = sorted(
    [
        "😀", "日本", "it's \"so\"", "a: b", "- c", "#hash", "-dash", "--flag", "new\nline", "{brace}", "[bracket]", "$x_1$ $", "tab\t",
        "\x1b[31mred", "null", "1e3", "50%", "a,b;c", "&and", "*star", "!bang", "\u2028", "\x85", NO_TEXT,
    ]
)  # fmt: skip
CLASSES = [name if name != NO_TEXT else r"caf\udce9" for name in NAMES]
MODEL = ["--model.backbone", "resnet20_cifar", "--model.head", "LinearHead", "--model.loss", "CrossEntropyLoss"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of a training on classes of these names, tested."""
    folder = tmp_path_factory.mktemp("names")
    one = dict.fromkeys(NAMES, 1)
    save_folders(folder / "the set 😀", train=one, test=one)
    data = ["--data", "FolderImages", "--data.root", str(folder / "the set 😀"), "--data.image_size", "8"]
    place = ["--trainer.default_root_dir", str(folder / "runs")]
    main(["fit", *data, *MODEL, *QUIET, "--trainer.max_epochs=1", *place, "--name", "r 😀: #'\""])
    (found,) = (folder / "runs").iterdir()
    main(["test", *data, *QUIET, "--ckpt_path", str(found / "checkpoints/last.ckpt")])
    return found


def checkpoint(run):
    return str(run / "checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("photos"), *(f"{name}.png" for name in NAMES))


def decided(run, images):
    model = Classifier.load_from_checkpoint(checkpoint(run)).eval()
    pixels = np.stack([np.asarray(Image.open(image)) for image in images]).transpose(0, 3, 1, 2) / 255
    with torch.no_grad():
        return [CLASSES[k] for k in model(torch.tensor((pixels - 0.5) / 0.5, dtype=torch.float32)).argmax(1)]


def test_images_of_any_name_are_predicted_and_named(run, photos, tmp_path):
    paths = sorted(map(str, photos.iterdir()))
    for suffix, images in (("csv", paths), ("npz", [str(photos)]), ("parquet", [str(photos)])):
        output = ["--output", str(tmp_path / f"out.{suffix}")]
        main(["predict", "--images", *images, "--ckpt_path", checkpoint(run), *output, *QUIET])
    expected = decided(run, paths)
    rows = read_csv(tmp_path / "out.csv")
    assert [row["image"] for row in rows] == paths
    assert [row["class"] for row in rows] == expected
    arrays, table = np.load(tmp_path / "out.npz"), parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert (arrays["image"].tolist(), arrays["class"][:, 0].tolist()) == (paths, expected)
    assert (table["image"], table["class"]) == (list(map(readable, paths)), expected)


def test_classes_of_any_name_are_in_the_checkpoint_and_the_table_of_a_test(run):
    assert torch.load(checkpoint(run), weights_only=True)["class_names"] == CLASSES
    assert [row["name"] for row in read_csv(run / "per_class.csv")] == CLASSES


def test_collapse_and_describe_take_a_run_with_such_names(run, tmp_path):
    collapse.main([str(run), "--output", str(tmp_path / "collapse")])
    assert json.loads((tmp_path / "collapse/collapse.json").read_text())["data"]["dataset"] == "the set 😀"
    describe.main([str(run), "--output", str(tmp_path / NO_TEXT)])
    assert json.loads((tmp_path / NO_TEXT / "describe.json").read_text())["class_names"] == CLASSES


def test_exported_models_have_such_names(run, tmp_path):
    import onnxruntime

    export.main([checkpoint(run), "--output", str(tmp_path / "out 😀"), "--format", "timm", "onnx", "torch-export"])
    config = json.loads((tmp_path / "out 😀/config.json").read_text())
    assert config["label_names"] == CLASSES
    session = onnxruntime.InferenceSession(tmp_path / "out 😀/model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == CLASSES
    assert "the set 😀" in (tmp_path / "out 😀/README.md").read_text(encoding="utf-8")


def test_a_checkpoint_from_before_names_were_text_is_read(run, tmp_path):
    saved = torch.load(checkpoint(run), weights_only=True)
    torch.save({**saved, "class_names": NAMES}, tmp_path / "old.ckpt")
    assert Classifier.load_from_checkpoint(tmp_path / "old.ckpt").class_names == CLASSES


texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["1e3", "null", "0x1", "1_0"])
plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:#😀", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(plain_data)
def test_plain_data_comes_back_from_yaml_as_it_was(value):
    assert load_yaml(to_yaml(value)) == value
