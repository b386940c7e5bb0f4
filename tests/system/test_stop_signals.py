"""A job of which one process has stopped taking part ends after a signal."""

import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback

from etflight.callbacks import stop_signals
from tests.command_line import ended, start
from tests.training import QUIET
from tests.waiting import wait_until

FIT = [
    "fit", "--data", "Digits", "--data.max_count", 10, "--data.batch_size", 8, "--model.backbone", "resnet20_cifar", *QUIET,
    "--trainer.strategy", "ddp", "--trainer.devices", 2, "--name", "r",
    "--trainer.callbacks+", "tests.system.test_stop_signals.StopsTakingPart",
]  # fmt: skip


class StopsTakingPart(Callback):
    """The second process sleeps from the third batch on."""

    def __init__(self):
        stop_signals.PATIENCE = 3.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == 1:
            Path("absent.pid").write_text(str(os.getpid()))
            while True:
                time.sleep(1000)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_of_which_one_process_takes_no_part_ends_after_sigterm(tmp_path):
    assert stop_signals.PATIENCE <= 45  # what is shortened here
    job, pid = start("etflight", *FIT, cwd=tmp_path), tmp_path / "absent.pid"
    try:
        wait_until(lambda: pid.exists() and pid.read_text(), process=job)
        time.sleep(1)  # for the other to come to wait
        job.send_signal(signal.SIGTERM)
        result = ended(job)
    finally:
        job.kill()
    assert result.status == 143, result.err
    (line,) = result.error_lines
    assert "SIGTERM" in line
    assert "Traceback" not in result.out + result.err
    wait_until(lambda: not is_running(int(pid.read_text())))  # the system may still be ending it
