"""`ReduceLROnPlateau` follows the number that it was told to."""

import csv

import pytest
import torch
from lightning.pytorch import Callback

from tests.left_by_runs import assert_same_run

FIT = [
    "fit", "--data", "Digits", "--data.max_count", 4, "--model.backbone", "resnet20_cifar", "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.limit_val_batches", 1,
    "--trainer.callbacks+", "tests.test_plateau.Logged", "--name",
]  # fmt: skip
PLATEAU = [
    "--model.lr_scheduler",
    "ReduceLROnPlateau",
    "--model.lr_scheduler.patience",
    0,
    "--model.lr_scheduler.monitor",
]
LOGGED = {"val/own_loss": [5, 4, 3, 2, 1, 0.5], "own/acc": [0.1, 0.5, 0.4, 0.6, 0.6, 0.6]}


class Logged(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        for name, values in LOGGED.items():
            pl_module.log(name, values[trainer.current_epoch])


def rates(cwd, name):
    rows = csv.DictReader((cwd / "runs" / name / "metrics.csv").open())
    return [float(row["train/lr"]) for row in rows if row["train/lr"]]


def rates_of_torch(values, mode, rate=0.1):
    """Of each epoch, by the schedule alone: it steps after an epoch, or not where that has no value."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=0)
    found = []
    for value in values:
        found.append(optimizer.param_groups[0]["lr"])
        if value is not None:
            schedule.step(value)
    return pytest.approx(found)


@pytest.mark.parametrize(("monitor", "mode", "falls"), [("val/own_loss", "min", 0), ("own/acc", "max", 2)])
def test_the_rate_falls_exactly_when_the_monitored_number_gets_no_better(
    monitor, mode, falls, etflight_command, tmp_path
):
    schedule = [*PLATEAU, monitor, "--model.lr_scheduler.mode", mode]
    result = etflight_command(*FIT, "r", *schedule, "--trainer.max_epochs", 6, cwd=tmp_path)
    assert result.status == 0, result.err
    assert rates(tmp_path, "r") == rates_of_torch(LOGGED[monitor], mode)
    assert len(set(rates(tmp_path, "r"))) == falls + 1  # the last epoch's has no epoch after it


def test_a_resumed_schedule_is_where_it_was(etflight_command, tmp_path):
    fit = [*PLATEAU, "own/acc", "--model.lr_scheduler.mode", "max", "--trainer.max_epochs"]
    for name, *argv in (["whole", 6], ["parts", 3], ["parts", 6, "--ckpt_path", "last"]):
        result = etflight_command(*FIT, name, *fit, *argv, cwd=tmp_path)
        assert result.status == 0, result.err
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/parts")


def test_a_schedule_waits_for_a_validation_that_comes_every_second_epoch(etflight_command, tmp_path):
    argv = [*PLATEAU, "own/acc", "--model.lr_scheduler.mode", "max", "--trainer.check_val_every_n_epoch", 2]
    result = etflight_command(*FIT, "r", *argv, "--trainer.max_epochs", 6, cwd=tmp_path)
    assert result.status == 0, result.err
    seen = [None if epoch % 2 == 0 else value for epoch, value in enumerate(LOGGED["own/acc"])]
    assert rates(tmp_path, "r") == rates_of_torch(seen, "max")


def test_the_loss_of_training_can_be_followed_without_validation(etflight_command, tmp_path):
    argv = [*PLATEAU, "train/loss", "--trainer.limit_val_batches", 0, "--trainer.max_epochs", 4]
    result = etflight_command(*FIT, "r", *argv, cwd=tmp_path)
    assert result.status == 0, result.err
    rows = list(csv.DictReader((tmp_path / "runs/r/metrics.csv").open()))
    assert rates(tmp_path, "r") == rates_of_torch(
        [float(row["train/loss"]) for row in rows if row["train/loss"]], "min"
    )


def test_torchs_own_class_follows_the_validation_loss(etflight_command, tmp_path):
    schedule = [
        "--model.lr_scheduler",
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "--model.lr_scheduler.patience",
        0,
    ]
    result = etflight_command(*FIT, "r", *schedule, "--trainer.max_epochs", 4, cwd=tmp_path)
    assert result.status == 0, result.err
    rows = list(csv.DictReader((tmp_path / "runs/r/metrics.csv").open()))
    assert rates(tmp_path, "r") == rates_of_torch([float(row["val/loss"]) for row in rows if row["val/loss"]], "min")


@pytest.mark.parametrize(
    ("argv", "hint", "before"),
    [
        (["val/los"], "such as val/loss", True),
        (["val/los", "--trainer.num_sanity_val_steps", 0], "such as val/loss", False),
        (["val/loss", "--trainer.limit_val_batches", 0, "--trainer.check_val_every_n_epoch", 2], "train/loss", True),
        (["own/precision"], "such as", False),
    ],
)
def test_a_monitor_that_is_never_logged_is_refused(argv, hint, before, etflight_command, tmp_path):
    result = etflight_command(*FIT, "r", *PLATEAU, *argv, "--trainer.max_epochs", 3, cwd=tmp_path)
    assert result.status == 1, result.err
    (line,) = result.error_lines
    assert f"cannot follow its monitor '{argv[0]}', which nothing has logged" in line
    assert hint in line
    trained = (tmp_path / "runs/r/speed.csv").exists()
    assert trained != before
    assert not (tmp_path / "runs/r/checkpoints/last.ckpt").exists()


def test_without_a_monitor_the_schedule_is_refused(etflight_command, tmp_path):
    result = etflight_command(*FIT, "r", *PLATEAU[:2], cwd=tmp_path)
    assert result.status == 2
    assert "these arguments are required: --model.lr_scheduler.monitor" in result.error_lines[0]
