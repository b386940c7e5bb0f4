"""Deferred re-weighting and re-sampling: by hand, resumed, on two processes, refused."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.callbacks import DeferredBalance
from etflight.data import Digits
from etflight.data.sampler import ImbalancedSampler
from etflight.utils.errors import UserError
from tests.left_by_runs import assert_same_run, read
from tests.system.test_ddp import (
    CPU,
    GLOBAL_BATCH,
    assert_same_rows,
    assert_same_weights,
    finish,
    rows,
    shared_by,
    start,
    weights,
)
from tests.system.test_resume import DIGITS, KILL

DEFERRED = """
trainer:
  callbacks+:
    - class_path: etflight.callbacks.DeferredBalance
      init_args: {epoch: 0.5, class_balance: effective, sampler: balanced}
"""
BOTH = {"class_balance": "effective", "sampler": "balanced"}


class Watch(Callback):
    """What each epoch was trained with."""

    def __init__(self):
        self.balances, self.labels = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.labels.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.labels[-1] += batch[1].tolist()
        self.balances.append((trainer.current_epoch, pl_module.loss.class_balance))


def train(*callbacks, epochs=3, data=None, loss=CrossEntropyLoss, **options):
    seed_everything(0, verbose=False)
    model = Classifier(
        10, "test_vit", in_chans=1, model_kwargs={"img_size": 8, "patch_size": 4}, head=LinearHead, loss=loss
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=list(callbacks), **{"max_epochs": epochs, **options},
    )  # fmt: skip
    trainer.fit(model, data or Digits(imbalance_ratio=20, batch_size=100))
    return model


def test_the_loss_and_the_sampler_change_in_the_named_epoch_and_not_before():
    watch = Watch()
    train(DeferredBalance(epoch=1, **BOTH), watch)
    assert set(watch.balances) == {(0, "none"), (1, "effective"), (2, "effective")}
    labels = Digits(imbalance_ratio=20).split("train").labels
    for epoch, policy in enumerate(["instance", "balanced", "balanced"]):
        sampler = ImbalancedSampler(labels.numpy(), policy, seed=0)
        sampler.set_epoch(epoch)
        assert watch.labels[epoch] == labels[sampler.draw()].tolist()


@pytest.mark.parametrize(("given", "first"), [(2, 2), (0, 0), (0.8, 4), (0.5, 2), (0.29, 1)])
def test_an_epoch_below_1_is_a_part_of_all(given, first):
    watch = Watch()
    train(DeferredBalance(epoch=given, class_balance="batch"), watch, epochs=5, limit_train_batches=1)
    assert [balance for _, balance in watch.balances] == ["none"] * first + ["batch"] * (5 - first)


def test_from_epoch_0_it_is_the_balance_given_from_the_start():
    deferred = train(DeferredBalance(epoch=0, **BOTH), epochs=1)
    balanced = train(
        epochs=1,
        loss=partial(CrossEntropyLoss, class_balance="effective"),
        data=Digits(imbalance_ratio=20, batch_size=100, sampler="balanced"),
    )
    plain = train(epochs=1)
    for name, value in balanced.state_dict().items():
        assert torch.equal(deferred.state_dict()[name], value), name
    assert not torch.equal(plain.head.weight, balanced.head.weight)


def test_a_run_killed_before_at_and_after_the_change_resumes_bit_by_bit(etflight_command, tmp_path):
    (tmp_path / "deferred.yaml").write_text(DEFERRED)
    fit = ["fit", "-c", "deferred.yaml", *DIGITS, "--checkpoint.every_n_steps", 1]
    whole = etflight_command(*fit, "--name", "whole", cwd=tmp_path)
    assert whole.status == 0, whole.err
    assert "from epoch 1 on: class balance 'effective', sampler 'balanced'" in whole.err + whole.out
    for after in (5, 14, 20):  # 14 batches an epoch
        name = f"killed_{after}"
        kill = [*KILL, after, "--trainer.callbacks.mark", f"{name}.mark"]
        assert etflight_command(*fit, "--name", name, *kill, cwd=tmp_path).status == -9
        assert read(tmp_path / "runs" / name)["global_step"] == after
        resumed = etflight_command(*fit, "--name", name, "--ckpt_path", "last", cwd=tmp_path)
        assert resumed.status == 0, resumed.err
        assert_same_run(tmp_path / "runs/whole", tmp_path / "runs" / name)


def test_two_processes_learn_what_one_does(etflight_command, tmp_path):
    (tmp_path / "deferred.yaml").write_text(DEFERRED)
    fit = [
        "fit", "-c", "deferred.yaml", *CPU, "--data", "Digits", "--data.imbalance_ratio", 20, "--data.batch_size", GLOBAL_BATCH,
        "--model.backbone", "test_vit", "--model.model_kwargs", '{"img_size": 8, "patch_size": 4}', "--model.head", "LinearHead",
        "--model.loss", "LogitAdjustedLoss", "--model.optimizer.lr", 0.05, "--trainer.max_epochs", 2,
    ]  # fmt: skip
    one = etflight_command(*fit, "--name", "one", cwd=tmp_path)
    assert one.status == 0, one.err
    printed = finish(start("etflight", *fit, *shared_by(2), "--name", "two", cwd=tmp_path))
    assert printed.count("from epoch 1 on") == 1
    assert_same_rows(rows(tmp_path / "runs/two"), rows(tmp_path / "runs/one"))
    assert_same_weights(weights(tmp_path / "runs/two"), weights(tmp_path / "runs/one"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "nothing to change"),
        ({"class_balance": "bach"}, "class_balance must be one of none, batch, global, effective, got 'bach'"),
        ({"sampler": "blanced"}, "did you mean balanced"),
        *(({"epoch": epoch, **BOTH}, "epoch is") for epoch in (-1, 1.5, float("nan"), float("inf"))),
    ],
)
def test_what_does_not_exist_is_refused_at_once(arguments, reason):
    with pytest.raises(UserError, match=reason):
        DeferredBalance(**arguments)


def test_an_epoch_that_is_never_reached_is_refused_before_training():
    for epoch in (3, 0.9):
        with pytest.raises(UserError, match=r"epoch 3 is never reached in 3 epochs.*max_epochs"):
            train(DeferredBalance(epoch=epoch, **BOTH))
    with pytest.raises(UserError, match="part of max_epochs"):
        train(DeferredBalance(**BOTH), max_epochs=-1, max_steps=3)


def test_a_loss_or_a_loader_that_cannot_follow_is_refused_before_training():
    loader = DataLoader(TensorDataset(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10), batch_size=10)
    with pytest.raises(UserError, match="set_class_counts"):
        train(DeferredBalance(class_balance="effective"), data=loader)
    with pytest.raises(UserError, match=r"ImbalancedSampler.*SequentialSampler"):
        train(DeferredBalance(sampler="balanced"), data=loader)


def test_a_mistake_in_a_configuration_is_one_line(etflight_command, tmp_path):
    (tmp_path / "deferred.yaml").write_text(DEFERRED.replace("balanced}", "blanced}"))
    result = etflight_command("fit", "-c", "deferred.yaml", *DIGITS, cwd=tmp_path)
    assert result.status == 1
    assert "did you mean balanced" in result.error_lines[0]
    assert len(result.error_lines) == 1
