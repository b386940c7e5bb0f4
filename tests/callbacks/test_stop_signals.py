"""A process that gets a signal ends in order where it can, and within a minute where it waits for others."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from etflight.callbacks import stop_signals
from etflight.callbacks.stop_signals import Watchdog
from tests.command_line import ROOT

# --- the watchdog ------------------------------------------------------------------------------------------------------


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(stop_signals, "PATIENCE", 0.5)


@pytest.fixture
def watched(patience):
    """A watchdog over this process, which notes SIGTERM and does nothing else; `ended` is set in place of its end."""
    before, outside = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(outside)
    dog = Watchdog(lambda: dog.busy, lambda number: (dog.numbers.append(number), dog.ended.set()), interval=0.05)
    dog.busy, dog.numbers, dog.ended = False, [], threading.Event()
    dog.start()
    yield dog
    dog.stop()
    dog.stop()  # again does no harm
    assert signal.set_wakeup_fd(outside) == outside
    signal.signal(signal.SIGTERM, before)


def get_on(seconds):
    """Work in which no call takes as long as the patience."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        for _ in range(3):
            time.sleep(0.05)


def test_a_process_in_a_call_that_never_ends_is_ended_once_it_was_told(watched):
    assert not watched.ended.wait(1.5)  # nobody has told it
    signal.raise_signal(signal.SIGTERM)
    assert watched.ended.wait(30)
    assert watched.numbers == [signal.SIGTERM]


def test_a_process_that_gets_on_is_left_alone_however_long_it_takes(watched):
    signal.raise_signal(signal.SIGTERM)
    get_on(2.5)
    assert not watched.numbers


def test_a_call_may_take_twice_as_long_as_the_longest_before_it(watched):
    time.sleep(1.5)
    signal.raise_signal(signal.SIGTERM)
    assert not watched.ended.wait(1.5)
    assert watched.ended.wait(30)


def test_who_is_busy_is_not_cut_short(watched):
    watched.busy = True
    signal.raise_signal(signal.SIGTERM)
    assert not watched.ended.wait(1.5)
    watched.busy = False
    assert watched.ended.wait(30)


# --- a job -------------------------------------------------------------------------------------------------------------

ABSENT = """
import os, signal, time
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

class TermInSanityCheck(Callback):
    def on_validation_batch_end(self, trainer, *_):
        if trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)
"""
FIT = [
    "fit", "--data", "Digits", "--data.max_count", 10, "--data.batch_size", 8, "--model.backbone", "resnet20_cifar",
    "--trainer.accelerator", "cpu", "--trainer.max_epochs", 2, "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--name", "r",
]  # fmt: skip


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_of_which_one_process_takes_no_part_ends_within_a_minute_of_sigterm(tmp_path):
    assert stop_signals.PATIENCE <= 45  # what is shortened here
    (tmp_path / "absent.py").write_text(ABSENT)
    argv = [*FIT, "--trainer.strategy", "ddp", "--trainer.devices", 2, "--trainer.callbacks+", "absent.StopsTakingPart"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, "-m", "etflight", *map(str, argv)],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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


def test_sigterm_before_the_first_step_is_answered_after_it(etflight_command, tmp_path):
    (tmp_path / "absent.py").write_text(ABSENT)
    result = etflight_command(*FIT, "--trainer.callbacks+", "absent.TermInSanityCheck", cwd=tmp_path)
    assert result.status == 143, result.err
    assert "SIGTERM: saved step 1;" in result.err + result.out
