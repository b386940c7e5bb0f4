"""A network in double or half precision: what has to be exact stays so, and every command works."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etflight import Classifier, CosineHead, CrossEntropyLoss, DotRegressionLoss, ETFHead, LinearHead
from etflight.losses import LDAMLoss, LogitAdjustedLoss
from etflight.metrics import ClassStatistics, ShotAccuracy
from etflight.metrics.accuracy import Reliability, SampleMean, TemperatureFit

DIGITS = ["--data", "Digits", "--data.max_count", 20, "--data.val_fraction", 0.2]
QUIET = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
]
PRECISIONS = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.fixture
def default_dtype():
    """What Lightning's plugin makes the default within the steps of a network in half precision."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


# --- the commands ------------------------------------------------------------------------------------------------------


def numbers(folder):
    return json.loads((folder / "test_metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(etflight_command, tmp_path_factory):
    """A run in float32, and what it is tested with."""
    cwd = tmp_path_factory.mktemp("float32")
    fit = ["fit", *DIGITS, *QUIET, "--model.backbone", "resnet20_cifar", "--trainer.max_epochs", 3, "--name", "r"]
    result = etflight_command(*fit, cwd=cwd)
    assert result.status == 0, result.err
    assert etflight_command("test", *DIGITS, *QUIET, "--ckpt_path", "last", "--name", "r", cwd=cwd).status == 0
    return cwd, numbers(cwd / "runs/r")


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-5), ("bf16-true", 0.05), ("16-true", 0.01)])
def test_a_trained_network_tests_alike_in_every_precision(precision, tolerance, trained, etflight_command):
    cwd, expected = trained
    checkpoint = ["--ckpt_path", cwd / "runs/r/checkpoints/last.ckpt", "--name", precision]
    result = etflight_command("test", *DIGITS, *QUIET, *checkpoint, "--trainer.precision", precision, cwd=cwd)
    assert result.status == 0, result.err
    tested = numbers(cwd / "runs" / precision)
    for name in ("test/loss", "test/acc", "test/ece", "test/ece_calibrated"):
        assert tested[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 2), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_command_works_in_every_precision(precision, etflight_command, tmp_path):
    options = [*DIGITS, *QUIET, "--trainer.precision", precision, "--name", "r"]
    monitor = ["--trainer.callbacks+", "NeuralCollapseMonitor"]
    fit = ["--model.backbone", "resnet20_cifar", "--data.mixup", 0.5, "--model.loss.class_balance", "batch"]
    last = ["--ckpt_path", "last"]
    for argv in (
        ["fit", *options, *fit, *monitor, "--trainer.max_epochs", 1],
        ["fit", *options, *fit, *monitor, "--trainer.max_epochs", 2, *last],
        ["validate", *options, *last],
        ["test", *options, *last],
        [
            "test",
            *options,
            "--ckpt_path",
            "runs/r/checkpoints/last.ckpt",
            "--name",
            "ncm",
            "--post_hoc",
            "NearestClassMean",
        ],
        ["predict", *options, *last, "--embeddings", "true", "--output", "predictions.npz"],
        ["collapse", "--ckpt_path", "runs/r/checkpoints/last.ckpt", *DIGITS],
        ["export", "runs/r/checkpoints/last.ckpt", "--output", "exported"],
    ):
        result = etflight_command(*argv, cwd=tmp_path)
        assert result.status == 0, (argv[0], result.err)
    saved = torch.load(tmp_path / "runs/r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    dtype = PRECISIONS[precision]
    assert {value.dtype for name, value in saved.items() if "conv" in name} == {dtype}
    frame = ETFHead(64, 10).weight
    assert torch.equal(saved["head.weight"].float(), frame)  # to the last bit, in half precision, too
    predicted = np.load(tmp_path / "predictions.npz")
    assert np.linalg.norm(predicted["embedding"], axis=1) == pytest.approx(1, abs=1e-6)
    rows = [row for row in csv.DictReader((tmp_path / "runs/r/metrics.csv").open()) if row["train/loss"]]
    assert all(0 < float(row["train/loss"]) < 2 for row in rows)


# --- heads -------------------------------------------------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def etf(head, h):
    return 3.0 * unit(h) @ head.weight.detach().numpy().T


def cosine(head, h):
    return 16.0 * unit(h) @ unit(head.weight.detach().numpy()).T


def linear(head, h):
    return unit(h) @ head.weight.detach().numpy().T + head.bias.detach().numpy()


HEADS = {
    "ETFHead": (partial(ETFHead, batch_norm=False, scale=3.0), etf),
    "CosineHead": (CosineHead, cosine),
    "LinearHead": (partial(LinearHead, feature_normalize=True), linear),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_heads_logits_in_float64_are_those_of_numpy(kind):
    make, oracle = HEADS[kind]
    head, features = make(16, 7).double(), torch.randn(50, 16, dtype=torch.float64)
    logits = head(features)
    assert logits.dtype == torch.float64
    np.testing.assert_allclose(logits.detach().numpy(), oracle(head, features.numpy()), rtol=0, atol=1e-12)


def test_target_logits_and_a_rotation_stay_in_float64():
    head = ETFHead(16, 7, learn_rotation=True).double().eval()
    nn.init.normal_(head.rotation.generator)
    features, target = torch.randn(50, 16, dtype=torch.float64), torch.randint(7, (50,))
    logits, R = head(features), head.rotation.matrix()
    np.testing.assert_allclose((R @ R.T).detach(), np.eye(16), atol=1e-13)
    expected = logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(head.target_logits(features, target), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_a_heads_cosines_in_half_precision_are_those_of_float32(kind, dtype):
    make, oracle = HEADS[kind]
    head, features = make(16, 7).to(dtype), torch.randn(50, 16).to(dtype)
    logits = head(features)
    assert logits.dtype == torch.float32
    expected = oracle(head.float(), features.double().numpy())
    np.testing.assert_allclose(
        logits.detach().numpy(), expected, atol=1e-5
    )  # rounding to half precision costs 1e-3 and more


def test_a_frame_moves_with_its_head_but_is_never_of_half_precision():
    frame = ETFHead(16, 7).weight
    assert torch.equal(ETFHead(16, 7).half().weight, frame)
    assert torch.equal(ETFHead(16, 7).to(torch.bfloat16).weight, frame)
    assert ETFHead(16, 7).double().weight.dtype == torch.float64
    assert ETFHead(16, 7).to("meta", torch.bfloat16).weight.device.type == "meta"


# --- losses ------------------------------------------------------------------------------------------------------------

COUNTS = torch.tensor([90, 40, 7])


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(z, y):
    return -log_softmax(z)[np.arange(len(y)), y]


def balanced(losses, y):
    n = np.bincount(y, minlength=3)
    return (losses * (len(y) / (n > 0).sum() / n[y])).mean()


LOSSES = {
    "cross-entropy": (partial(CrossEntropyLoss, class_balance="batch"), lambda z, y: balanced(cross_entropy(z, y), y)),
    "dot regression": (
        partial(DotRegressionLoss, class_balance="global"),
        lambda z, y: ((z[np.arange(len(y)), y] - 1) ** 2 / 2 * (137 / 3 / COUNTS.numpy()[y])).mean(),
    ),
    "logit adjustment": (
        LogitAdjustedLoss,
        lambda z, y: cross_entropy(z + np.log(COUNTS.numpy() / 137), y).mean(),
    ),
    "LDAM": (
        LDAMLoss,
        lambda z, y: cross_entropy(z - 30 * np.eye(3)[y] * 0.5 * (7 / COUNTS.numpy()) ** 0.25, y).mean(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_float64_is_that_of_numpy(name):
    make, oracle = LOSSES[name]
    loss = make()
    loss.set_class_counts(COUNTS)
    z, y = torch.randn(40, 3, dtype=torch.float64), torch.randint(3, (40,))
    value = loss(z, y)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(oracle(z.numpy(), y.numpy()), rel=1e-12)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_half_precision_is_that_of_float32(name):
    make, oracle = LOSSES[name]
    loss = make()
    loss.set_class_counts(COUNTS)
    z, y = torch.randn(40, 3).to(torch.bfloat16), torch.randint(3, (40,))
    assert loss(z, y).item() == pytest.approx(oracle(z.double().numpy(), y.numpy()), rel=1e-5)


# --- metrics -----------------------------------------------------------------------------------------------------------

METRICS = [SampleMean, partial(ShotAccuracy, 3), Reliability, TemperatureFit, partial(ClassStatistics, 3, 4)]


@pytest.mark.parametrize("make", METRICS, ids=lambda make: getattr(make, "func", make).__name__)
def test_a_metric_in_a_network_of_half_precision_keeps_its_dtypes(make):
    before = {name: state.dtype for name, state in make().metric_state.items()}
    network = nn.Sequential(make()).to(torch.bfloat16).half()
    assert {name: state.dtype for name, state in network[0].metric_state.items()} == before
    network[0].reset()
    assert {name: state.dtype for name, state in network[0].metric_state.items()} == before


@pytest.mark.parametrize("make", [Reliability, TemperatureFit])
def test_calibration_within_a_step_of_half_precision_is_that_of_float32(make, request):
    logits, target = 3 * torch.randn(400, 3), torch.randint(3, (400,))
    expected, metric = make(), make()
    expected.update(logits, target)
    request.getfixturevalue("default_dtype")
    metric.update(logits, target)
    for name, state in expected.metric_state.items():
        assert torch.equal(metric.metric_state[name], state), name


def test_a_classifier_takes_images_of_float32_whatever_its_precision():
    images = torch.randn(2, 1, 8, 8)
    expected = Classifier(10, "resnet20_cifar", in_chans=1).eval()
    double = Classifier(10, "resnet20_cifar", in_chans=1).eval()
    double.load_state_dict(expected.state_dict())
    logits = double.double()(images)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), expected(images), rtol=1e-4, atol=1e-5)
    half = double.to(torch.bfloat16)
    assert half.embed(images).dtype == torch.float32
    assert F.cosine_similarity(half.embed(images), expected.embed(images)).min() > 0.99
