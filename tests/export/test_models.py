"""The trained models that the repository carries."""

import json
from pathlib import Path

import pytest
import timm
import torch

import etflight.backbones.resnet_cifar  # noqa: F401  (registers their architecture in timm)
from etflight.data import CIFAR10

ROOT = Path(__file__).parents[2]
MODELS = sorted((ROOT / "notebooks/models").iterdir())


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_each_is_small_and_loads_in_timm_with_its_preprocessing(folder):
    assert (folder / "model.safetensors").stat().st_size < 2e6
    model = load(folder)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, len(model.pretrained_cfg["label_names"]))
    assert model.pretrained_cfg["mean"] == pytest.approx(CIFAR10.standard_mean)


@pytest.mark.skipif(not (ROOT / "data/cifar-10-batches-bin").is_dir(), reason="CIFAR-10 is not in data/")
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_committed_models_reach_their_recorded_accuracy(folder):
    model, data = load(folder), CIFAR10(root=str(ROOT / "data"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as the record was taken
        batches = [data.eval_transform(batch) for batch in data.eval_dataloader("test")]
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    records = json.loads((ROOT / "notebooks/results/cifar10_lt.json").read_text())
    (record,) = [record for record in records if f"cifar10_lt_{record['arm']}" == folder.name and record["seed"] == 0]
    assert right / 10_000 == pytest.approx(record["test/acc"], abs=3e-4)
