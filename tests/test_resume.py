"""A run that was killed and resumed is the run that was never interrupted."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.runs import assert_same_run, read

DIGITS = [
    "--data", "Digits", "--data.imbalance_ratio", 20, "--data.batch_size", 32, "--data.crop_padding", 1,
    "--model.backbone", "resnet20_cifar", "--model.loss.class_balance", "batch", "--model.lr_scheduler", "WarmupCosine",
    "--model.lr_scheduler.warmup_epochs", 2, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", 1,
]  # fmt: skip
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
        kill = ["--trainer.callbacks+=tests.runs.Kill", "--trainer.callbacks.after", after]
        assert etflight_command(*fit, "--name", name, *kill, cwd=tmp_path).status == -9
        saved = read(tmp_path / "runs" / name)
        assert 0 < saved["global_step"] < read(tmp_path / "runs/whole")["global_step"]
        resumed = etflight_command(*fit, "--name", name, "--ckpt_path", "last", cwd=tmp_path)
        assert resumed.status == 0, resumed.err
        assert "Restored all states" in resumed.err
        assert_same_run(tmp_path / "runs/whole", tmp_path / "runs" / name)


def etflight_processes(*argv, cwd, devices=2):
    """`etflight` on several processes, which must start from a real one."""
    command = [
        sys.executable,
        "-m",
        "etflight",
        *map(str, argv),
        "--trainer.strategy",
        "ddp",
        "--trainer.devices",
        str(devices),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def killed_on_two(tmp_path_factory):
    """A run on two processes that was never interrupted, and one whose first process was killed within the second epoch."""
    cwd = tmp_path_factory.mktemp("two")
    (cwd / "watched.yaml").write_text(WATCHED)
    fit = ["fit", "-c", "watched.yaml", *DIGITS, "--data.batch_size", 16, "--checkpoint.every_n_steps", 2]
    whole = etflight_processes(*fit, "--name", "whole", cwd=cwd)
    assert whole.returncode == 0, whole.stderr
    kill = ["--trainer.callbacks+=tests.runs.Kill", "--trainer.callbacks.after", 20]
    assert etflight_processes(*fit, "--name", "killed", *kill, cwd=cwd).returncode != 0
    assert read(cwd / "runs/killed")["global_step"] == 20
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
    assert read(cwd / "runs/one")["global_step"] == 20 + 27 - 12  # 431 images make 27 batches of 16


def test_the_last_steps_are_saved_whatever_the_rhythm(etflight_command, tmp_path):
    result = etflight_command("fit", *DIGITS, "--name", "r", "--checkpoint.every_n_steps", 9, cwd=tmp_path)
    assert result.status == 0, result.err
    assert read(tmp_path / "runs/r")["global_step"] == 28


def test_sigterm_saves_at_the_next_batch_and_exits_143(etflight_command, tmp_path):
    stop = ["--trainer.callbacks+=tests.runs.Kill", "--trainer.callbacks.after", 16, "--trainer.callbacks.signal", 15]
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
