"""Decisions after training, used: each of them tests, predicts and exports alike."""

import csv
import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch

import etflight
from etflight.data import Digits

DATA = ["--data=Digits", "--data.imbalance_ratio=20", "--data.val_fraction=0.2", "--trainer.accelerator=cpu"]
FIT = ["fit", *DATA, "--model.backbone=test_resnet", "--model.head=LinearHead", "--model.loss=CrossEntropyLoss"]
DECISIONS = {
    "ncm": ["--post_hoc=NearestClassMean"],
    "tau_norm": ["--post_hoc=TauNormalization", "--post_hoc.tau=0.5"],
    "adjusted": ["--model.logit_adjustment=1.0"],
    "multiplied": ["--model.logit_adjustment=0.2", "--model.adjustment=multiplicative"],
}


@pytest.fixture(scope="module")
def folder(etflight_command, tmp_path_factory):
    """A folder with a trained run, one run for each decision that was tested, and the digits as arrays."""
    cwd = tmp_path_factory.mktemp("decisions")
    etflight_command.succeed(*FIT, "--monitor=null", "--trainer.max_epochs=4", "--name=ce", cwd=cwd)
    for name, words in DECISIONS.items():
        etflight_command.succeed("test", *DATA, *words, f"--name={name}", "--ckpt_path", trained(cwd), cwd=cwd)
    images = torch.cat([images for images, _ in Digits().eval_dataloader("test")])[:, 0]
    np.savez(cwd / "digits.npz", images=images.numpy())
    return cwd


def trained(cwd):
    return cwd / "runs/ce/checkpoints/last.ckpt"


def normalised(images):
    return (torch.from_numpy(images)[:, None] / 255 - Digits.standard_mean[0]) / Digits.standard_std[0]


@pytest.mark.parametrize("name", DECISIONS)
def test_a_tested_decision_predicts_and_exports_with_the_same_calibrated_probabilities(name, folder, etflight_command):
    words = [*DECISIONS[name], "--ckpt_path", trained(folder), f"--name={name}", "--trainer.accelerator=cpu"]
    told = etflight_command.succeed(
        "predict", *words, "--images", "digits.npz", "--top_k=10", f"--output={name}.csv", cwd=folder
    )
    assert "fitted on held-out images" in told.out + told.err
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    predicted = torch.zeros(len(rows), 10)
    for row, cells in zip(predicted, rows, strict=True):
        for k in range(1, 11):
            suffix = "" if k == 1 else f"_{k}"
            row[int(cells[f"class{suffix}"])] = float(cells[f"probability{suffix}"])

    labels = torch.cat([labels for _, labels in Digits().eval_dataloader("test")])
    results = json.loads((folder / f"runs/{name}/test_metrics.json").read_text())
    assert results["test/acc"] == pytest.approx((predicted.argmax(1) == labels).double().mean().item())
    assert results["test/ece_calibrated"] < 0.25

    images = torch.from_numpy(np.load(folder / "digits.npz")["images"])[:, None]
    in_python = etflight.load(folder / "runs" / name).predict(images, batch_size=500, top_k=10)
    ordered = torch.zeros_like(predicted).scatter(1, in_python.labels, in_python.probabilities)
    torch.testing.assert_close(ordered, predicted, rtol=0, atol=2e-6)

    formats = ["onnx", "torch-export"] + ["timm"] * (name != "ncm")
    etflight_command.succeed("export", f"runs/{name}", f"--output=of_{name}", "--format", *formats, cwd=folder)
    images = normalised(np.load(folder / "digits.npz")["images"])
    session = onnxruntime.InferenceSession(folder / f"of_{name}/model.onnx")
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits).softmax(1), predicted, rtol=0, atol=1e-4)
    graph = torch.export.load(folder / f"of_{name}/model.pt2").module()
    torch.testing.assert_close(graph(images).softmax(1), predicted, rtol=0, atol=1e-5)
    if name != "ncm":  # its embeddings are normalised
        network = timm.create_model(f"local-dir:{folder / f'of_{name}'}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(network(images).softmax(1), predicted, rtol=0, atol=1e-4)
    card = (folder / f"of_{name}/README.md").read_text()
    assert "## Decision" in card
    assert f"| test/acc | {results['test/acc']:.4g} |" in card


def test_a_decision_asked_for_in_the_export_is_the_one_that_a_run_of_it_exports(folder, etflight_command):
    for name in ("ncm", "adjusted"):
        words = ["--format=torch-export", f"--output=asked_{name}"]
        etflight_command.succeed("export", "runs/ce", *words, *DECISIONS[name], cwd=folder)
        etflight_command.succeed("export", f"runs/{name}", f"--output=run_{name}", "--format=torch-export", cwd=folder)
        images = normalised(np.load(folder / "digits.npz")["images"])
        one, other = (torch.export.load(folder / f"{what}_{name}/model.pt2").module() for what in ("asked", "run"))
        assert torch.equal(one(images), other(images))
        card = (folder / f"asked_{name}/README.md").read_text()
        assert "## Decision" in card
        assert "## Results" not in card  # those of the trained run are another decision's


def test_nearest_means_without_the_images_of_the_training_are_refused_in_one_line(folder, etflight_command, tmp_path):
    elsewhere = tmp_path / "moved.ckpt"
    elsewhere.write_bytes(trained(folder).read_bytes())
    words = ["--post_hoc=NearestClassMean", "--output=out"]
    refused = etflight_command("export", elsewhere, *words, cwd=tmp_path)
    refused.assert_refused("NearestClassMean needs the images of the training")
    images = ["--images", folder / "digits.npz", "--name=x", "--trainer.accelerator=cpu"]
    refused = etflight_command(
        "predict", "--ckpt_path", elsewhere, "--post_hoc=NearestClassMean", *images, cwd=tmp_path
    )
    refused.assert_refused("NearestClassMean needs the images of the training")
