"""`ReduceLROnPlateau` follows the number that it was told to."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers.logger import DummyLogger

from etflight import Classifier
from etflight.callbacks import LastCheckpoint
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.training import new_trainer

LAST = "checkpoints/last.ckpt"
LOGGED = [0.1, 0.5, 0.4, 0.6, 0.6, 0.6]
FOLLOW = partial(ReduceLROnPlateau, patience=0)
FOLLOW_OWN = partial(FOLLOW, monitor="own/acc", mode="max")


class Own(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("own/acc", LOGGED[trainer.current_epoch])


class Numbers(DummyLogger):
    """Keeps what is logged, by name and epoch."""

    def __init__(self):
        super().__init__()
        self.seen = defaultdict(list)

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.seen[name].append(value)


def fit(schedule, folder, epochs=6, ckpt_path=None, **options):
    torch.manual_seed(0)
    model, numbers = Classifier(10, "resnet20_cifar", in_chans=1, lr_scheduler=schedule), Numbers()
    options = {"logger": numbers, "max_epochs": epochs, "limit_val_batches": 1, "default_root_dir": folder, **options}
    trainer = new_trainer(LastCheckpoint(), Own(), **options)
    try:
        trainer.fit(model, Digits(max_count=2), ckpt_path=ckpt_path)
    except UserError as error:
        return str(error), trainer.global_step > 0
    return numbers.seen


def rates_of_torch(values, mode, rate=0.1):
    """The rate of each epoch, by the schedule alone: it steps after an epoch, unless that has no value."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=0)
    found = []
    for value in values:
        found.append(optimizer.param_groups[0]["lr"])
        if value is not None:
            schedule.step(value)
    return pytest.approx(found)


def test_the_rate_falls_exactly_when_the_monitored_number_gets_no_better_in_a_resumed_run_too(tmp_path):
    whole = fit(FOLLOW_OWN, tmp_path)["train/lr"]
    assert whole == rates_of_torch(LOGGED, "max")
    assert len(set(whole)) == 3
    first = fit(FOLLOW_OWN, tmp_path, epochs=3)["train/lr"]
    assert first + fit(FOLLOW_OWN, tmp_path, ckpt_path=tmp_path / LAST)["train/lr"] == whole


def test_a_schedule_waits_for_a_validation_that_comes_every_second_epoch(tmp_path):
    seen = fit(FOLLOW_OWN, tmp_path, check_val_every_n_epoch=2)
    assert seen["train/lr"] == rates_of_torch([None, 0.5, None, 0.6, None, 0.6], "max")


@pytest.mark.parametrize(
    ("schedule", "followed", "validation"),
    [
        (partial(FOLLOW, monitor="train/loss"), "train/loss", 0),
        (partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0), "val/loss", 1),  # which has no monitor
    ],
)
def test_the_schedule_can_monitor_a_loss(schedule, followed, validation, tmp_path):
    seen = fit(schedule, tmp_path, epochs=4, limit_val_batches=validation)
    assert seen["train/lr"] == rates_of_torch(seen[followed], "min")


@pytest.mark.parametrize(
    ("monitor", "options", "hint", "after_training"),
    [
        ("val/los", {}, "such as val/loss", False),
        ("val/los", {"num_sanity_val_steps": 0}, "such as val/loss", True),
        ("val/loss", {"limit_val_batches": 0, "check_val_every_n_epoch": 2}, "such as train/loss", False),
        ("own/precision", {}, "such as", True),
    ],
)
def test_a_monitor_that_is_never_logged_is_refused(monitor, options, hint, after_training, tmp_path):
    error, trained = fit(partial(FOLLOW, monitor=monitor), tmp_path, epochs=3, **options)
    assert repr(monitor) in error
    assert hint in error
    assert trained == after_training
    assert not (tmp_path / LAST).exists()
