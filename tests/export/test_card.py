"""The model card, as the Hugging Face Hub and a stranger read it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from etflight import Classifier
from etflight.cli import export
from etflight.data import ArrayImages
from etflight.data.preprocessing import Preprocessing
from etflight.export.card import model_card
from tests.training import save_arrays, save_trained

COLOUR = Preprocessing((3, 16, 16), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def card_of(classifier: Classifier, licence: str | None = None, **formats: bool) -> str:
    card, problems = model_card("my: model", classifier, COLOUR, formats or {"timm": True}, None, licence)
    assert problems == []
    return card


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(2, "test_resnet").eval()


def test_the_hub_reads_licence_and_library_where_they_are_known(classifier):
    card = ModelCard(card_of(classifier, "cc-by-4.0")).data
    assert (card.license, card.library_name, card.pipeline_tag) == ("cc-by-4.0", "timm", "image-classification")
    assert {"timm", "neural-collapse"} <= set(card.tags)
    assert card.model_name == "my: model"
    front = ModelCard(card_of(classifier, onnx=True)).data
    assert (front.license, front.library_name) == (None, None)


def test_it_says_where_the_temperature_comes_from():
    model = Classifier(2, "test_resnet").eval()
    assert "temperature 0.435, the default of DotRegressionLoss" in card_of(model, onnx=True)
    model.is_calibrated = True
    assert "temperature 0.435, fitted on held-out images" in card_of(model, onnx=True)
    model.temperature.fill_(1.0)  # as for a head that is put in for an evaluation
    assert "no temperature fitted" in card_of(model, onnx=True)


@pytest.mark.parametrize(("channels", "formats"), [(1, ["timm", "onnx", "torch-export"]), (3, ["timm"])])
def test_the_code_in_the_card_runs(channels, formats, tmp_path, monkeypatch, capsys):
    """Its Python, block by block, with a picture of another size and mode."""
    torch.manual_seed(0)
    save_arrays(tmp_path / "a.npz", shape=(16, 16, channels), classes=2, class_names=np.array(["cat", "dog"]))
    model = Classifier(2, "test_resnet", in_chans=channels)
    save_trained(tmp_path / "m.ckpt", model, ArrayImages(str(tmp_path / "a.npz"), mean=[0.3], std=[0.4], batch_size=20))
    export.main([str(tmp_path / "m.ckpt"), "--output", str(tmp_path / "m"), "--format", *formats])
    Image.new("RGBA", (21, 16), "red").save(tmp_path / "m" / "one.png")
    monkeypatch.chdir(tmp_path / "m")
    text = Path("README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    images = torch.randn(5, channels, 16, 16)
    expected = model.calibrated(model.eval()(images))
    capsys.readouterr()
    exec(blocks[0].replace("PATH_OF_THIS_FOLDER", ".").replace("PATH_OF_AN_IMAGE", "one.png"), {})
    assert capsys.readouterr().out.strip() in ("cat", "dog")
    for block, given in zip(blocks[1:], (images.numpy(), images), strict=len(formats) == 3):
        names = {"images": given}
        exec(block, names)
        torch.testing.assert_close(torch.as_tensor(names["logits"]), expected, rtol=0, atol=1e-4)
