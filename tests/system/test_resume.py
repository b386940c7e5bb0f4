"""A run that was killed and resumed is the run that was never interrupted."""

import csv
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from tests.cli.test_bad_input import QUICK, folder
from tests.command_line import ROOT
from tests.left_by_runs import assert_same_run, read

DIGITS = [
    "--data", "Digits", "--data.imbalance_ratio", 20, "--data.batch_size", 32, "--data.crop_padding", 1,
    "--model.backbone", "resnet20_cifar", "--model.loss.class_balance", "batch", "--model.lr_scheduler", "WarmupCosine",
    "--model.lr_scheduler.warmup_epochs", 2, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", 1,
]  # fmt: skip
TWO = ["--trainer.strategy", "ddp", "--trainer.devices", 2]
KILL = ["--trainer.callbacks+=tests.left_by_runs.Kill", "--trainer.callbacks.after"]
WATCHED = """
trainer:
  callbacks:
    - class_path: etflight.callbacks.NeuralCollapseMonitor
      init_args: {before_training: false}
    - class_path: etflight.callbacks.NeuralCollapseMonitor
      init_args: {online: true, space: backbone}
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.9}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
"""
# 431 training images: 14 batches an epoch, 13 where a tenth is held out
EVERYTHING = [
    "--model.model_kwargs", '{"drop_rate": 0.2}', "--data.mixup", 0.5, "--data.val_fraction", 0.1,
    "--data.sampler", "balanced", "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 0.5,
]  # fmt: skip
KINDS = {
    "accumulation, validation within the epoch, mixup, dropout, temperature": (EVERYTHING, [5, 12, 14, 20]),
    "two workers, validation after each epoch, online statistics": (["--data.num_workers", 2], [17]),
    "counted in steps": (
        ["--trainer.max_epochs", -1, "--trainer.max_steps", 24, "--model.lr_scheduler.total_epochs", 2],
        [13, 20],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_bit_by_bit(kind, etflight_command, tmp_path):
    options, kills = KINDS[kind]
    (tmp_path / "watched.yaml").write_text(WATCHED)
    fit = ["fit", "-c", "watched.yaml", *DIGITS, *options, "--checkpoint.every_n_steps", 1]
    whole = etflight_command(*fit, "--name", "whole", cwd=tmp_path)
    assert whole.status == 0, whole.err
    for after in kills:
        name = f"killed_{after}"
        kill = [*KILL, after, "--trainer.callbacks.mark", f"{name}.mark"]
        assert etflight_command(*fit, "--name", name, *kill, cwd=tmp_path).status == -9
        saved = read(tmp_path / "runs" / name)
        assert 0 < saved["global_step"] < read(tmp_path / "runs/whole")["global_step"]
        resumed = etflight_command(*fit, "--name", name, "--ckpt_path", "last", cwd=tmp_path)
        assert resumed.status == 0, resumed.err
        assert "Restored all states" in resumed.err
        assert_same_run(tmp_path / "runs/whole", tmp_path / "runs" / name)


def processes(*command, cwd, **env):
    """Run several `etflight` processes, which must start from a real one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **env}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    argv = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


def etflight_processes(*argv, cwd):
    return processes("etflight", *argv, *TWO, cwd=cwd)


@pytest.fixture(scope="module")
def killed_on_two(tmp_path_factory):
    """A run on two processes that was never interrupted, and one whose first process was killed within the second epoch."""
    cwd = tmp_path_factory.mktemp("two")
    (cwd / "watched.yaml").write_text(WATCHED)
    # a validation while gradients accumulate: DDP does not equalise BatchNorm's statistics before it
    odd = ["--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 7]
    fit = ["fit", "-c", "watched.yaml", *DIGITS, "--data.batch_size", 16, "--checkpoint.every_n_steps", 1, *odd]
    whole = etflight_processes(*fit, "--name", "whole", cwd=cwd)
    assert whole.returncode == 0, whole.stderr
    kill = [*KILL, 20]
    killed = etflight_processes(*fit, "--name", "killed", *kill, cwd=cwd)
    assert killed.returncode == -9
    assert read(cwd / "runs/killed")["global_step"] == 7 + 3
    return cwd, fit


def test_two_processes_resume_bit_by_bit_with_what_each_had_gathered(killed_on_two):
    cwd, fit = killed_on_two
    shutil.copytree(cwd / "runs/killed", cwd / "runs/resumed")
    resumed = etflight_processes(*fit, "--name", "resumed", "--ckpt_path", "last", cwd=cwd)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(cwd / "runs/whole", cwd / "runs/resumed")


def test_one_process_goes_on_within_the_epoch_of_two(killed_on_two, etflight_command):
    cwd, fit = killed_on_two
    shutil.copytree(cwd / "runs/killed", cwd / "runs/one")
    result = etflight_command(*fit, "--name", "one", "--ckpt_path", "last", cwd=cwd)
    assert result.status == 0, result.err
    assert "goes on after 12 batches of 16" in result.err + result.out  # 6 batches of 2 x 16 images
    assert read(cwd / "runs/one")["global_step"] == 10 + 8  # 431 images make 27 batches of 16, of which 15 are left


@pytest.mark.parametrize("done", [4, 5])  # of 6; more of 16 images than there are in an epoch
def test_an_epoch_goes_on_where_the_new_batches_leave_no_whole_one(done, etflight_command, tmp_path):
    fit = ["fit", *DIGITS, "--trainer.limit_train_batches", 6, "--checkpoint.every_n_steps", 1, "--name", "r"]
    assert etflight_command(*fit, *KILL, done, cwd=tmp_path).status == -9
    smaller = ["--data.batch_size", 16, "--ckpt_path", "last"]
    result = etflight_command(*fit, *smaller, cwd=tmp_path)
    assert result.status == 0, result.err
    assert "goes on after 5 batches of 16" in result.err + result.out
    assert read(tmp_path / "runs/r")["global_step"] == done + 1 + 6
    rows = list(csv.DictReader((tmp_path / "runs/r/metrics.csv").open()))
    assert [row["epoch"] for row in rows if row["val/acc"]] == ["0.0", "1.0"]


def test_a_job_whose_process_dies_ends_with_one_message(killed_on_two):
    cwd, fit = killed_on_two
    kill = [*KILL, 3, "--trainer.callbacks.rank", 1, "--trainer.callbacks.mark", "rank_one.mark"]
    job = etflight_processes(*fit, "--name", "rank_one", *kill, cwd=cwd)
    assert job.returncode != 0
    assert time.time() - (cwd / "rank_one.mark").stat().st_mtime < 60
    errors = [line for line in job.stderr.splitlines() if line.startswith("etflight: error:")]
    assert len(errors) == 1, job.stderr
    assert "process 1 of this job was killed by SIGKILL" in errors[0]
    assert "--ckpt_path last" in errors[0]
    assert "Traceback" not in job.stderr


def test_torchrun_restarts_a_dead_process_from_the_last_checkpoint(killed_on_two):
    cwd, fit = killed_on_two
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    kill = [*KILL, 17, "--trainer.callbacks.rank", 1, "--trainer.callbacks.mark", "torchrun.mark"]
    argv = ["-m", "etflight", *fit, *TWO, "--name", "torchrun", *kill, "--ckpt_path", "last"]
    # without it, the second try finds the first one's addresses in the store
    job = processes(*torchrun, *argv, cwd=cwd, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert job.returncode == 0, job.stderr
    assert (cwd / "torchrun.mark").exists()
    assert "Restored all states" in job.stderr
    assert_same_run(cwd / "runs/whole", cwd / "runs/torchrun")


def test_the_last_steps_are_saved_whatever_the_rhythm(etflight_command, tmp_path):
    result = etflight_command("fit", *DIGITS, "--name", "r", "--checkpoint.every_n_steps", 9, cwd=tmp_path)
    assert result.status == 0, result.err
    assert read(tmp_path / "runs/r")["global_step"] == 28


def test_sigterm_saves_at_the_next_batch_and_exits_143(etflight_command, tmp_path):
    stop = [*KILL, 16, "--trainer.callbacks.signal", 15]
    whole = etflight_command("fit", *DIGITS, "--name", "whole", cwd=tmp_path)
    assert whole.status == 0, whole.err
    stopped = etflight_command("fit", *DIGITS, "--name", "r", *stop, cwd=tmp_path)
    assert stopped.status == 143, stopped.err
    assert "SIGTERM: saved step 17" in stopped.err + stopped.out
    assert "Traceback" not in stopped.err
    assert read(tmp_path / "runs/r")["global_step"] == 17
    assert etflight_command("fit", *DIGITS, "--name", "r", "--ckpt_path", "last", cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/r")


def test_another_length_of_the_schedule_is_refused_on_resume(etflight_command, tmp_path):
    assert etflight_command("fit", *DIGITS, "--name", "r", cwd=tmp_path).status == 0
    longer = etflight_command(
        "fit", *DIGITS, "--trainer.max_epochs", 3, "--name", "r", "--ckpt_path", "last", cwd=tmp_path
    )
    assert longer.status == 1
    assert "--trainer.max_epochs 2" in longer.error_lines[0]


def test_a_full_disk_leaves_the_checkpoint_before(etflight_command, tmp_path):
    full = [
        "--trainer.callbacks+=tests.left_by_runs.LimitFiles",
        "--trainer.callbacks.after",
        16,
        "--trainer.callbacks.size",
        100_000,
    ]
    fit = ["fit", *DIGITS, "--checkpoint.every_n_steps", 1]
    assert etflight_command(*fit, "--name", "whole", cwd=tmp_path).status == 0
    result = etflight_command(*fit, "--name", "r", *full, cwd=tmp_path)
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert "could not be written" in result.error_lines[0]
    assert "the checkpoint before it is intact" in result.error_lines[0]
    assert read(tmp_path / "runs/r")["global_step"] == 16
    assert [path.name for path in (tmp_path / "runs/r/checkpoints").iterdir()] == ["last.ckpt"]
    assert etflight_command(*fit, "--name", "r", "--ckpt_path", "last", cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/r")


def test_weights_that_are_not_finite_never_reach_the_checkpoint(etflight_command, tmp_path):
    spoil = ["--trainer.callbacks+=tests.left_by_runs.Spoil", "--trainer.callbacks.after", 16]
    result = etflight_command("fit", *DIGITS, "--name", "r", *spoil, "--checkpoint.every_n_steps", 1, cwd=tmp_path)
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert "NaN or infinite" in result.error_lines[0]
    assert "step 17" in result.error_lines[0]
    saved = read(tmp_path / "runs/r")
    assert saved["global_step"] == 16
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())


GREEDY = """
import torch
from etflight import LinearHead

class GreedyHead(LinearHead):
    def forward(self, features):
        return super().forward(features) + torch.empty(10**15)[0]
"""


def test_too_little_memory_is_told_with_the_mend(etflight_command, tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    head = ["--model.head", "greedy.GreedyHead", "--model.loss", "CrossEntropyLoss"]
    result = etflight_command("fit", *DIGITS, "--name", "r", *head, cwd=tmp_path)
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert "out of memory" in result.error_lines[0]
    assert "--data.batch_size" in result.error_lines[0]


@pytest.mark.parametrize(
    ("other", "word"),
    [(["--seed_everything", 1], "--seed_everything"), (["--data.imbalance_ratio", 10], "--data options")],
)
def test_another_seed_or_other_images_are_refused_on_resume(other, word, etflight_command, tmp_path):
    assert etflight_command("fit", *DIGITS, "--name", "r", cwd=tmp_path).status == 0
    result = etflight_command("fit", *DIGITS, *other, "--name", "r", "--ckpt_path", "last", cwd=tmp_path)
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert word in result.error_lines[0]


def test_another_folder_is_refused_on_resume_and_the_same_one_elsewhere_goes_on(etflight_command, tmp_path):
    for name, classes in (("pets", ("cat", "dog")), ("birds", ("auk", "tit")), ("moved/pets", ("cat", "dog"))):
        folder(tmp_path / name, dict.fromkeys(classes, 4))

    def fit(root, *argv, epochs=1):
        data = ["--data", "FolderImages", "--data.root", root, "--data.image_size", 8, "--data.batch_size", 4]
        quiet = [*QUICK, "--model.backbone", "resnet20_cifar", "--name", "r", "--ckpt_path", "last"]
        return etflight_command("fit", *data, *quiet, "--trainer.max_epochs", epochs, *argv, cwd=tmp_path)

    assert fit("pets").status == 0
    refused = fit("birds", epochs=2)
    assert refused.status == 1
    assert len(refused.error_lines) == 1
    assert "give the same --data options" in refused.error_lines[0]
    moved = fit("moved/pets", epochs=2)
    assert moved.status == 0, moved.err


def test_a_checkpoint_that_knows_its_choice_of_images_but_not_their_set_goes_on(etflight_command, tmp_path):
    constant = [*DIGITS, "--model.lr_scheduler", "null"]
    assert etflight_command("fit", *constant, "--name", "r", cwd=tmp_path).status == 0
    path = tmp_path / "runs/r/checkpoints/last.ckpt"
    saved = read(tmp_path / "runs/r")
    content, _, choice = saved.pop("fingerprint").partition("-")
    torch.save({**saved, "etflight": {**saved["etflight"], "images": choice}}, path)
    other = etflight_command(
        "fit", *constant, "--data.imbalance_ratio", 10, "--name", "r", "--ckpt_path", "last", cwd=tmp_path
    )
    assert other.status == 1
    assert "--data options" in other.error_lines[0]
    longer = ["--trainer.max_epochs", 3]
    same = etflight_command("fit", *constant, *longer, "--name", "r", "--ckpt_path", "last", cwd=tmp_path)
    assert same.status == 0, same.err
    assert (
        read(tmp_path / "runs/r")["fingerprint"]
        == read(tmp_path / "runs/r")["etflight"]["images"]
        == f"{content}-{choice}"
    )


STOP = """
import os, signal
from lightning.pytorch import Callback

class Stop(Callback):
    def on_test_batch_start(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_sigterm_ends_a_test_at_once(etflight_command, tmp_path):
    assert etflight_command("fit", *DIGITS, "--name", "r", cwd=tmp_path).status == 0
    (tmp_path / "stop.py").write_text(STOP)
    argv = ["test", "--data", "Digits", "--name", "r", "--ckpt_path", "last", "--trainer.callbacks+=stop.Stop"]
    assert etflight_command(*argv, cwd=tmp_path).status == 143
    assert not (tmp_path / "runs/r/test_metrics.json").exists()
