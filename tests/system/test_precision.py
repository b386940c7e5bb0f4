"""A network in double or half precision: every command works, and what has to be exact stays so."""

import json

import numpy as np
import pytest
import torch

from etflight import ETFHead
from tests.training import QUIET, read_csv

DIGITS = ["--data", "Digits", "--data.max_count", 20, "--data.val_fraction", 0.2]
FIT = ["fit", *DIGITS, *QUIET, "--model.backbone", "resnet20_cifar", "--name", "r"]
LAST = "runs/r/checkpoints/last.ckpt"


def run(command, cwd, *commands):
    for argv in commands:
        command(*argv, cwd=cwd).ran()


def numbers(folder):
    return json.loads((folder / "test_metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(etflight_command, tmp_path_factory):
    """A run in float32, and what it is tested with."""
    cwd = tmp_path_factory.mktemp("float32")
    test = ["test", *DIGITS, *QUIET, "--ckpt_path", "last", "--name", "r"]
    run(etflight_command, cwd, [*FIT, "--trainer.max_epochs", 3], test)
    return cwd, numbers(cwd / "runs/r")


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("64-true", torch.float64, 1e-5), ("bf16-true", torch.bfloat16, 0.05), ("16-true", torch.float16, 0.01)],
)
def test_every_command_works_in_every_precision(precision, dtype, tolerance, trained, etflight_command, tmp_path):
    cwd, expected = trained
    others = ["test", *DIGITS, *QUIET, "--trainer.precision", precision, "--name", precision, "--ckpt_path"]
    run(etflight_command, cwd, [*others, LAST])
    tested = numbers(cwd / "runs" / precision)
    for name in ("test/loss", "test/acc", "test/ece", "test/ece_calibrated"):
        assert tested[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 2), name

    options = [*DIGITS, *QUIET, "--trainer.precision", precision, "--name", "r"]
    fit = [*FIT, "--trainer.precision", precision, "--data.mixup", 0.5, "--model.loss.class_balance", "batch"]
    # few images: a processor takes a hundred times as long for a backward in float16
    fit += ["--data.batch_size", 16, "--trainer.limit_train_batches", 2]
    fit += ["--trainer.callbacks+", "NeuralCollapseMonitor", "--trainer.max_epochs"]
    post_hoc = [*options[:-1], "ncm", "--ckpt_path", LAST, "--post_hoc", "NearestClassMean"]
    predict = ["--ckpt_path", "last", "--embeddings", "true", "--output", "predictions.npz"]
    others = ["collapse", LAST, *DIGITS], ["export", LAST, "--output", "exported"]
    fits = [*fit, 1], [*fit, 2, "--ckpt_path", "last"]
    run(etflight_command, tmp_path, *fits, ["test", *post_hoc], ["predict", *options, *predict], *others)
    saved = torch.load(tmp_path / LAST, weights_only=True)["state_dict"]
    assert {value.dtype for name, value in saved.items() if "conv" in name} == {dtype}
    assert torch.equal(saved["head.weight"].float(), ETFHead(64, 10).weight)  # to the last bit, in half precision, too
    predicted = np.load(tmp_path / "predictions.npz")
    assert np.linalg.norm(predicted["embedding"], axis=1) == pytest.approx(1, abs=1e-6)
    rows = [row for row in read_csv(tmp_path / "runs/r/metrics.csv") if row["train/loss"]]
    assert all(0 < float(row["train/loss"]) < 2 for row in rows)
