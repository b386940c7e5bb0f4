"""Deferred re-weighting and re-sampling, and the warning about classes that are balanced twice."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CrossEntropyLoss, DotRegressionLoss, LDAMLoss, LinearHead, LogitAdjustedLoss
from etflight.callbacks import DeferredBalance, TauNormalization
from etflight.callbacks.balance import DoubleCorrection, corrections
from etflight.data import Digits
from etflight.data.sampler import ImbalancedSampler
from etflight.losses import BinaryCrossEntropyLoss
from etflight.utils.errors import UserError
from tests.left_by_runs import assert_resumes
from tests.training import QUIET, new_trainer

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


def new_model(loss=CrossEntropyLoss, **options):
    seed_everything(0, verbose=False)
    vit = {"img_size": 8, "patch_size": 4}
    return Classifier(10, "test_vit", in_chans=1, model_kwargs=vit, head=LinearHead, loss=loss, **options)


def train(*callbacks, epochs=3, data=None, loss=CrossEntropyLoss, **options):
    model = new_model(loss)
    trainer = new_trainer(*callbacks, **{"limit_val_batches": 0, "max_epochs": epochs, **options})
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


def test_a_loader_of_ones_own_is_drawn_from_as_before_in_the_next_training():
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 10
    sampler = ImbalancedSampler(labels, "instance")
    loader = DataLoader(TensorDataset(images, labels), batch_size=20, sampler=sampler)
    train(DeferredBalance(1, sampler="sqrt"), DeferredBalance(2, sampler="balanced"), data=loader)
    assert sampler.policy == "instance"


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_changes_the_last_that_is_due_holds_in_any_order(order):
    watch, changes = Watch(), [DeferredBalance(1, "global", "sqrt"), DeferredBalance(3, "effective")]
    model = train(*changes[::order], watch, epochs=4, limit_train_batches=1)
    assert [balance for _, balance in watch.balances] == ["none", "global", "global", "effective"]
    assert model.loss.class_balance == "none"


@pytest.mark.parametrize(("given", "first"), [(0, 0), (0.8, 4), (0.29, 1)])
def test_an_epoch_below_1_is_a_part_of_all(given, first):
    watch = Watch()
    train(DeferredBalance(epoch=given, class_balance="batch"), watch, epochs=5, limit_train_batches=1)
    assert [balance for _, balance in watch.balances] == ["none"] * first + ["batch"] * (5 - first)


def test_a_run_killed_before_at_and_after_the_change_resumes_bit_by_bit_with_its_collapse_curves(tmp_path):
    (tmp_path / "deferred.yaml").write_text(
        "trainer: {callbacks+: [{class_path: etflight.callbacks.DeferredBalance, init_args: "
        "{epoch: 0.5, class_balance: effective, sampler: balanced}}]}"
    )
    fit = [
        "fit", "-c", tmp_path / "deferred.yaml", "--data", "Digits", "--data.imbalance_ratio", 20, "--model.backbone", "resnet20_cifar",
        *QUIET, "--trainer.limit_train_batches", 3, "--trainer.max_epochs", 2,
    ]  # fmt: skip
    assert_resumes(fit, tmp_path, kills=(1, 3, 4))


def deferred_weights(rank, folder, processes):
    model = train(
        DeferredBalance(epoch=1, **BOTH), epochs=2, limit_train_batches=4, default_root_dir=folder, devices=processes,
        strategy="auto" if processes == 1 else "ddp", data=Digits(imbalance_ratio=20, batch_size=60 // processes),
    )  # fmt: skip
    return model.state_dict()


def test_two_processes_learn_what_one_does(two_ready_processes, tmp_path):
    one = deferred_weights(0, tmp_path, 1)
    for two in two_ready_processes(deferred_weights, [(tmp_path, 2)] * 2):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "nothing to change"),
        ({"class_balance": "bach"}, "class_balance must be one of none, batch, global, effective, got 'bach'"),
        ({"sampler": "blanced"}, "give one of instance, sqrt, balanced"),
        *(({"epoch": epoch, **BOTH}, "epoch is") for epoch in (-1, 1.5, float("nan"))),
    ],
)
def test_what_does_not_exist_is_refused_at_once(arguments, reason):
    with pytest.raises(UserError, match=reason):
        DeferredBalance(**arguments)


def test_an_epoch_a_loss_or_a_loader_that_cannot_be_had_is_refused_before_training():
    loader = DataLoader(TensorDataset(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10), batch_size=10)
    for arguments, options, reason in (
        ({"epoch": 0.9, **BOTH}, {}, r"epoch 3 is never reached in 3 epochs.*max_epochs"),
        (BOTH, {"max_epochs": -1, "max_steps": 3}, "part of max_epochs"),
        ({"class_balance": "effective"}, {"data": loader}, "set_class_counts"),
        ({"sampler": "balanced"}, {"data": loader}, r"ImbalancedSampler.*SequentialSampler"),
    ):
        with pytest.raises(UserError, match=reason):
            train(DeferredBalance(**arguments), **options)


# --- balanced twice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "sampler", "deferred", "times"),
    [
        (CrossEntropyLoss(), "balanced", {}, 1),
        (CrossEntropyLoss(class_balance="global"), 1.0, {}, 1),
        (LogitAdjustedLoss(), "1", {}, 1),
        (LDAMLoss(), None, {"class_balance": "effective"}, 1),
        (DotRegressionLoss(class_balance="batch"), "balanced", {}, 1),  # weights of what was drawn
        (CrossEntropyLoss(class_balance="batch"), None, {"sampler": "balanced"}, 1),
        (LogitAdjustedLoss(class_balance="batch"), None, {}, 2),
        (LogitAdjustedLoss(tau=0.5), "sqrt", {}, 1),  # the frequencies of what was drawn
        (LogitAdjustedLoss(tau=0.3), 0.3, {}, 1),
        (LogitAdjustedLoss(tau=0.5), "balanced", {}, 2),
        (LogitAdjustedLoss(tau=0.5), "progressive", {}, 2),
        (LogitAdjustedLoss(tau=0.5), None, {"sampler": "sqrt"}, 2),
        (BinaryCrossEntropyLoss(), 0.5, {}, 2),
        (BinaryCrossEntropyLoss(tau=0), 0.5, {}, 1),
        (LogitAdjustedLoss(), None, {"sampler": "reverse"}, 2),
        (CrossEntropyLoss(), None, {"class_balance": "global", "sampler": "balanced"}, 2),
    ],
)
def test_the_corrections_of_a_training_are_those_that_do_not_work_together(loss, sampler, deferred, times):
    callbacks = [DeferredBalance(**deferred)] if deferred else []
    assert len(corrections(loss, sampler, callbacks)) == times


def test_what_corrects_twice_says_so_in_one_line(recwarn):
    for stage, own, sampler, callbacks, named in (
        ("fit", {}, None, [], None),
        ("fit", {}, "balanced", [], "2 times, by sampler 'balanced' and LogitAdjustedLoss (tau 1): rare classes"),
        ("test", {}, None, [], None),
        ("test", {}, None, [TauNormalization()], "LogitAdjustedLoss (tau 1) and TauNormalization (tau 1)"),
        ("test", {"logit_adjustment": 1.0}, None, [], "LogitAdjustedLoss (tau 1) and post-hoc logit_adjustment 1"),
    ):
        model = new_model(LogitAdjustedLoss, class_counts=[10] * 10, **own)
        data = Digits(imbalance_ratio=20, sampler=sampler)
        recwarn.clear()
        trainer = new_trainer(DoubleCorrection(), *callbacks, fast_dev_run=True)
        getattr(trainer, stage)(model, datamodule=data)
        told = [str(w.message) for w in recwarn if "class frequencies are corrected" in str(w.message)]
        assert len(told) == (named is not None)
        assert named is None or named in told[0]
