"""What a test leaves: against scikit-learn, and on two processes."""

import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.callbacks.results import TestResults
from etflight.data import Digits
from etflight.reporting.tables import COLUMNS
from tests.training import new_trainer, read_csv, seen

COUNTS = [128, 91, 65, 47, 33, 24, 17, 12, 8, 6]


def untrained(num_classes=10, **options):
    """A model that decides for all kinds of classes."""
    seed_everything(0, verbose=False)
    model = Classifier(num_classes, "resnet20_cifar", LinearHead, CrossEntropyLoss, in_chans=1, **options)
    with torch.no_grad():
        logits = model.eval()(torch.rand(100, 1, 8, 8).round() * 2 - 1)
        model.head.weight /= logits.std(0)[:, None]
        model.head.bias.copy_((model.head.bias - logits.mean(0)) / logits.std(0))
    model.temperature.fill_(0.5)
    return model


def run_test(model, data, folder, verbose=True, **options):
    new_trainer(TestResults(verbose), default_root_dir=folder, **options).test(model, data, verbose=False)


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A folder after a test, the model, the labels and decisions found without a trainer, and what was printed."""
    folder = tmp_path_factory.mktemp("tested")
    model, data = untrained(class_counts=COUNTS), Digits()
    with redirect_stdout(StringIO()) as printed:
        run_test(model, data, folder)
    logits, labels = seen(data, "test", model.eval())
    assert len(logits.argmax(1).unique()) > 3
    return folder, model, labels.numpy(), logits.argmax(1).numpy(), printed.getvalue()


def test_the_folder_has_figures_and_a_table_of_scikit_learns_scores_and_the_groups(tested):
    folder, _, labels, decisions, _ = tested
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"confusion.png", "per_class.png", "reliability.png"}
    rows = read_csv(folder / "per_class.csv")
    precision, recall, _, support = precision_recall_fscore_support(labels, decisions, zero_division=np.nan)
    for name, expected in {"acc": recall, "precision": precision, "test_images": support}.items():
        np.testing.assert_allclose([float(row[name]) for row in rows], expected, err_msg=name)
    assert [int(row["train_images"]) for row in rows] == COUNTS
    assert [row["shots"] for row in rows] == ["many"] + 5 * ["medium"] + 4 * ["few"]
    assert [row["third"] for row in rows] == 3 * ["head"] + 4 * ["middle"] + 3 * ["tail"]


def test_of_classes_of_one_size_no_head_and_tail_are_shown(tmp_path):
    with redirect_stdout(StringIO()) as printed:
        run_test(untrained(class_counts=[40] * 10), Digits(), tmp_path)
    assert "By training images" in printed.getvalue()
    assert "By thirds" not in printed.getvalue()
    assert "long-tailed" not in printed.getvalue()
    assert {row["third"] for row in read_csv(tmp_path / "per_class.csv")} == {""}
    assert "test/acc_head" not in json.loads((tmp_path / "test_metrics.json").read_text())


def test_evaluation_returns_the_counts_behind_the_metrics(tested):
    folder, model, labels, decisions, _ = tested
    evaluation = model.evaluation()
    assert evaluation.confusion.tolist() == confusion_matrix(labels, decisions).tolist()
    metrics = json.loads((folder / "test_metrics.json").read_text())
    assert evaluation.raw.ece.item() == pytest.approx(metrics["test/ece"], rel=1e-6)
    assert evaluation.calibrated.ece.item() == pytest.approx(metrics["test/ece_calibrated"], rel=1e-6)
    assert metrics["test/ece"] != metrics["test/ece_calibrated"]
    assert {
        f"test/acc_{way}_{ratio}" for way in ("forward", "backward") for ratio in (2, 5, 10, 25, 50)
    } < metrics.keys()


def test_tables_tell_the_metrics_within_80_columns(tested):
    folder, *_, printed = tested
    assert max(map(len, printed.splitlines())) <= 80
    metrics = json.loads((folder / "test_metrics.json").read_text())
    for name in metrics.keys() - {"test/loss"}:
        assert f"{100 * metrics[name]:.2f} " in printed, name
    for text in ("500 images of 10 classes", "many (1)", "few (4)", "middle (4)", "temperature 0.5", "backward"):
        assert text in printed


def test_the_calibration_error_with_the_temperature_has_the_name_that_reports_have_for_it(tested):
    folder, *_, printed = tested
    metrics = json.loads((folder / "test_metrics.json").read_text())
    heads, _, values = (line.split() for line in printed.partition("Calibration")[2].splitlines()[2:5])
    assert heads == ["raw", "ECE", "ECE"]
    (column,) = [column for column in COLUMNS if column.title == heads[-1]]
    assert values[-1] == f"{100 * metrics[column.metric]:.2f}" != values[0]


def test_without_training_counts_there_are_no_groups_and_without_room_no_confusion_matrix(tmp_path, capsys):
    model = untrained(1001)
    run_test(model, DataLoader(TensorDataset(torch.randn(6, 1, 8, 8), torch.arange(6)), batch_size=4), tmp_path)
    assert model.evaluation().confusion is None
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["reliability.png"]
    assert len(read_csv(tmp_path / "per_class.csv")) == 1001
    assert "many" not in capsys.readouterr().out


def test_a_trial_run_leaves_no_file(tmp_path):
    run_test(untrained(), Digits(), tmp_path, verbose=False, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
