"""A job of which one process has stopped taking part ends within a minute of a signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from etflight.callbacks import stop_signals
from tests.command_line import ROOT

ABSENT = """
import os, time
from pathlib import Path
from lightning.pytorch import Callback
from etflight.callbacks import stop_signals

stop_signals.PATIENCE = 3.0

class StopsTakingPart(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == 1:
            Path("absent.pid").write_text(str(os.getpid()))
            while True:
                time.sleep(1000)
"""
FIT = [
    "fit", "--data", "Digits", "--data.max_count", "10", "--data.batch_size", "8", "--model.backbone", "resnet20_cifar",
    "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--name", "r", "--trainer.callbacks+", "absent.StopsTakingPart",
]  # fmt: skip


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_of_which_one_process_takes_no_part_ends_within_a_minute_of_sigterm(tmp_path):
    assert stop_signals.PATIENCE <= 45  # what is shortened here
    (tmp_path / "absent.py").write_text(ABSENT)
    job = subprocess.Popen(
        [sys.executable, "-m", "etflight", *FIT], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        pid = tmp_path / "absent.pid"
        while not (pid.exists() and pid.read_text()):
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.1)
        time.sleep(1)  # for the other to come to wait
        job.send_signal(signal.SIGTERM)
        printed, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 143, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("etflight: error:")]
    assert "SIGTERM: ended at once, without saving" in line
    assert "--ckpt_path last" in line
    assert "Traceback" not in printed
    assert not is_running(int(pid.read_text()))
