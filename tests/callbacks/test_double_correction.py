"""A warning where class frequencies are corrected twice, and none where they are not."""

import pytest

from etflight import CrossEntropyLoss, DotRegressionLoss, LDAMLoss, LogitAdjustedLoss
from etflight.callbacks import DeferredBalance
from etflight.callbacks.balance import training_corrections
from tests.system.test_ddp import CPU

DRW = DeferredBalance(class_balance="effective")


@pytest.mark.parametrize(
    ("loss", "sampler", "callbacks"),
    [
        (CrossEntropyLoss(), None, []),
        (CrossEntropyLoss(), "balanced", []),
        (CrossEntropyLoss(class_balance="global"), "instance", []),
        (CrossEntropyLoss(class_balance="global"), 1.0, []),
        (LogitAdjustedLoss(), "1", []),
        (LogitAdjustedLoss(tau=0), "sqrt", []),
        (LDAMLoss(), None, [DRW]),
        (DotRegressionLoss(class_balance="batch"), "balanced", []),  # weights of what was drawn
        (CrossEntropyLoss(class_balance="batch"), None, [DeferredBalance(sampler="balanced")]),
    ],
)
def test_one_correction_is_no_double(loss, sampler, callbacks):
    assert len(training_corrections(loss, sampler, callbacks)) <= 1


@pytest.mark.parametrize(
    ("loss", "sampler", "callbacks"),
    [
        (LogitAdjustedLoss(), "balanced", []),
        (LogitAdjustedLoss(), 0.5, []),
        (LogitAdjustedLoss(class_balance="batch"), None, []),
        (LogitAdjustedLoss(), None, [DRW]),
        (LogitAdjustedLoss(), None, [DeferredBalance(sampler="reverse")]),
        (CrossEntropyLoss(class_balance="effective"), "balanced", []),
        (CrossEntropyLoss(), None, [DeferredBalance(class_balance="global", sampler="balanced")]),
    ],
)
def test_two_corrections_are_both_named(loss, sampler, callbacks):
    assert len(training_corrections(loss, sampler, callbacks)) == 2


DIGITS = [*CPU, "--data", "Digits", "--data.imbalance_ratio", 20]
FIT = [
    "fit",
    *DIGITS,
    "--model.backbone",
    "resnet20_cifar",
    "--model.head",
    "LinearHead",
    "--model.loss",
    "LogitAdjustedLoss",
]


def warnings(result):
    lines = (result.out + result.err).splitlines()
    return [line for line in lines if "class frequencies are corrected" in line]


def test_a_training_that_corrects_twice_says_so_in_one_line(etflight_command, tmp_path):
    trial = [*FIT, "--trainer.fast_dev_run", "true"]
    one = etflight_command(*trial, cwd=tmp_path)
    assert one.status == 0, one.err
    assert warnings(one) == []
    (line,) = warnings(etflight_command(*trial, "--data.sampler", "balanced", cwd=tmp_path))
    assert line.startswith("etflight: warning: class frequencies are ")
    assert "corrected 2 times, by sampler 'balanced' and LogitAdjustedLoss (tau 1): rare classes" in line


def test_an_evaluation_says_so_when_it_corrects_what_training_has_corrected(etflight_command, tmp_path):
    trained = etflight_command(*FIT, "--trainer.max_epochs", 1, "--name", "la", cwd=tmp_path)
    assert trained.status == 0, trained.err
    test = ["test", *DIGITS, "--ckpt_path", "runs/la/checkpoints/last.ckpt"]
    assert warnings(etflight_command(*test, cwd=tmp_path)) == []
    for given, named in (
        (["--model.logit_adjustment", 1], "LogitAdjustedLoss (tau 1) and post-hoc logit_adjustment 1"),
        (["--post_hoc", "TauNormalization"], "LogitAdjustedLoss (tau 1) and TauNormalization (tau 1)"),
    ):
        (line,) = warnings(etflight_command(*test, *given, "--name", "twice", cwd=tmp_path))
        assert named in line
