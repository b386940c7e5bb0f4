"""A run that was killed and resumed is the run that was never interrupted."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from etflight import LinearHead
from tests.command_line import ended, start
from tests.left_by_runs import assert_killed_run_resumes, assert_same_run, kill, read
from tests.training import QUIET, read_csv

DIGITS = [
    "--data", "Digits", "--data.imbalance_ratio", 20, "--data.batch_size", 32, "--data.crop_padding", 1,
    "--model.backbone", "resnet20_cifar", "--model.loss.class_balance", "batch", "--model.lr_scheduler", "WarmupCosine",
    "--model.lr_scheduler.warmup_epochs", 2, "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 1, *QUIET,
]  # fmt: skip
EACH_STEP = ["--checkpoint.every_n_steps", 1]
LAST = ["--ckpt_path", "last"]
WATCHED = """
trainer:
  callbacks:
    - class_path: etflight.callbacks.NeuralCollapseMonitor
      init_args: {before_training: false}
    - class_path: etflight.callbacks.NeuralCollapseMonitor
      init_args: {online: true, space: backbone}
    - class_path: etflight.callbacks.ExponentialMovingAverage
      init_args: {decay: 0.9}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
"""
# 431 training images: 14 batches an epoch, 13 where a tenth is held out
EVERYTHING = [
    "--model.model_kwargs", '{"drop_rate": 0.2}', "--data.mixup", 0.5, "--data.val_fraction", 0.1,
    "--data.sampler", "balanced", "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 0.5,
]  # fmt: skip
AUGMENTED = [
    "--data.auto_augment", "randaugment", "--data.cutout", 2, "--data.random_erasing", 0.2, "--data.views", 2,
]  # fmt: skip
KINDS = {
    "accumulation, validation within the epoch, mixup, dropout, temperature, sharpness-aware steps": (
        [*EVERYTHING, "--model.sam_rho", 0.05], [5, 12, 20]),
    "two workers, validation after each epoch, online statistics, views": (["--data.num_workers", 2, *AUGMENTED], [13]),
    "counted in steps": (
        ["--trainer.max_epochs", -1, "--trainer.max_steps", 24, "--model.lr_scheduler.total_epochs", 2], [20]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_bit_by_bit(kind, etflight_command, tmp_path):
    options, kills = KINDS[kind]
    (tmp_path / "watched.yaml").write_text(WATCHED)
    fit = ["fit", "-c", "watched.yaml", *DIGITS, *options]
    etflight_command(*fit, "--name", "whole", cwd=tmp_path).ran()
    for after in kills:
        assert_killed_run_resumes(etflight_command, tmp_path, fit, after)


# --- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_on_two(tmp_path_factory):
    """A run on two processes that was never interrupted, and one whose second process was killed within the second epoch."""
    cwd = tmp_path_factory.mktemp("two")
    (cwd / "watched.yaml").write_text(WATCHED)
    # a validation while gradients accumulate: DDP does not equalise BatchNorm's statistics before it
    odd = ["--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 7]
    one = ["fit", "-c", "watched.yaml", *DIGITS, "--data.batch_size", 16, *EACH_STEP, *odd]
    two = [*one, "--trainer.strategy", "ddp", "--trainer.devices", 2]
    ended(start("etflight", *two, "--name", "whole", cwd=cwd)).ran()
    return cwd, one, two, ended(start("etflight", *two, "--name", "killed", *kill(20, rank=1), cwd=cwd))


def test_a_job_whose_process_dies_ends_with_one_message(killed_on_two):
    cwd, _, _, job = killed_on_two
    assert job.status != 0
    (line,) = job.error_lines
    assert "process 1 of this job was killed by SIGKILL" in line
    assert "--ckpt_path last" in line
    assert "Traceback" not in job.err
    assert read(cwd / "runs/killed")["global_step"] == 7 + 3


def test_one_process_goes_on_within_the_epoch_of_two(killed_on_two, etflight_command):
    cwd, fit, *_ = killed_on_two
    result = etflight_command(*fit, "--name", "killed", *LAST, cwd=cwd).ran()
    assert "goes on after 12 batches of 16" in result.err + result.out  # 6 batches of 2 x 16 images
    assert read(cwd / "runs/killed")["global_step"] == 10 + 8  # 431 images make 27 batches of 16, of which 15 are left


def test_torchrun_restarts_a_dead_process_from_the_last_checkpoint_bit_by_bit(killed_on_two):
    cwd, _, fit, *_ = killed_on_two
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "-m", "etflight"]
    argv = [*fit, "--name", "torchrun", *kill(20, rank=1, mark="torchrun.mark"), *LAST]
    # without it, the second try finds the first one's addresses in the store
    job = ended(start(*torchrun, *argv, cwd=cwd, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")).ran()
    assert (cwd / "torchrun.mark").exists()
    assert "Restored all states" in job.err
    assert_same_run(cwd / "runs/whole", cwd / "runs/torchrun")


# --- faults on the way -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(etflight_command, tmp_path_factory):
    """The current folder of a run that was never interrupted, whose number of steps no multiple of its rhythm is."""
    cwd = tmp_path_factory.mktemp("whole")
    etflight_command("fit", *DIGITS, "--name", "whole", "--checkpoint.every_n_steps", 9, cwd=cwd).ran()
    assert read(cwd / "runs/whole")["global_step"] == 28  # the last steps are saved, too
    return cwd


def test_sigterm_saves_at_the_next_batch_and_exits_143(whole, etflight_command):
    fit = ["fit", *DIGITS, "--name", "stopped"]
    stopped = etflight_command(*fit, *kill(16, signal=15), cwd=whole)
    assert stopped.status == 143, stopped.err
    assert "SIGTERM: saved step 17" in stopped.err + stopped.out
    assert "Traceback" not in stopped.err
    assert read(whole / "runs/stopped")["global_step"] == 17
    etflight_command(*fit, *LAST, cwd=whole).ran()
    assert_same_run(whole / "runs/whole", whole / "runs/stopped")


def test_a_full_disk_leaves_the_checkpoint_before(whole, etflight_command):
    full = ["--trainer.callbacks+=tests.left_by_runs.LimitFiles", "--trainer.callbacks.after", 16]
    fit = ["fit", *DIGITS, *EACH_STEP, "--name", "full"]
    result = etflight_command(*fit, *full, cwd=whole)
    result.assert_refused("could not be written", "the checkpoint before it is intact")
    assert read(whole / "runs/full")["global_step"] == 16
    assert [path.name for path in (whole / "runs/full/checkpoints").iterdir()] == ["last.ckpt"]
    etflight_command(*fit, *LAST, cwd=whole).ran()
    assert_same_run(whole / "runs/whole", whole / "runs/full")


def test_weights_that_are_not_finite_never_reach_the_checkpoint(etflight_command, tmp_path):
    spoil = ["--trainer.callbacks+=tests.left_by_runs.Spoil", "--trainer.callbacks.after", 16]
    result = etflight_command("fit", *DIGITS, "--name", "r", *spoil, *EACH_STEP, cwd=tmp_path)
    result.assert_refused("NaN or infinite", "step 17")
    saved = read(tmp_path / "runs/r")
    assert saved["global_step"] == 16
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())


class GreedyHead(LinearHead):
    def logits(self, embedding):
        return super().logits(embedding) + torch.empty(10**15)[0]


def test_too_little_memory_is_told_with_the_mend(etflight_command, tmp_path):
    head = ["--model.head", "tests.system.test_resume.GreedyHead", "--model.loss", "CrossEntropyLoss"]
    result = etflight_command("fit", *DIGITS, "--name", "r", *head, cwd=tmp_path)
    result.assert_refused("out of memory", "--data.batch_size")


class Stop(Callback):
    def on_test_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_test_at_once(whole, etflight_command):
    argv = ["test", "--data", "Digits", "--name", "whole", *LAST, "--trainer.callbacks+=tests.system.test_resume.Stop"]
    assert etflight_command(*argv, cwd=whole).status == 143
    assert not (whole / "runs/whole/test_metrics.json").exists()


# --- another training than the one that was begun ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (["--trainer.max_epochs", 3], "--trainer.max_epochs 2"),  # which is the length of the schedule
        (["--seed_everything", 1], "--seed_everything"),
        (["--data.imbalance_ratio", 10], "--data options"),
    ],
)
def test_another_training_is_refused_on_resume(other, words, whole, etflight_command):
    etflight_command("fit", *DIGITS, *other, "--name", "whole", *LAST, cwd=whole).assert_refused(words)


@pytest.mark.parametrize("done", [4, 5])  # of 6; more of 16 images than there are in an epoch
def test_an_epoch_goes_on_where_the_new_batches_leave_no_whole_one(done, etflight_command, tmp_path):
    fit = ["fit", *DIGITS, "--trainer.limit_train_batches", 6, *EACH_STEP, "--name", "r"]
    assert etflight_command(*fit, *kill(done), cwd=tmp_path).status == -9
    result = etflight_command(*fit, "--data.batch_size", 16, *LAST, cwd=tmp_path).ran()
    assert "goes on after 5 batches of 16" in result.err + result.out
    assert read(tmp_path / "runs/r")["global_step"] == done + 1 + 6
    rows = read_csv(tmp_path / "runs/r/metrics.csv")
    assert [row["epoch"] for row in rows if row["val/acc"]] == ["0.0", "1.0"]
