"""A process that gets a signal ends in order where it can, and a watchdog ends it where it waits for ever."""

import signal
import threading
import time

import pytest
from lightning.pytorch import Callback

from etflight.callbacks import stop_signals
from etflight.callbacks.stop_signals import Watchdog
from tests.left_by_runs import read
from tests.training import fit_digits


@pytest.fixture
def watched(monkeypatch):
    """A watchdog over this process, which notes SIGTERM and does nothing else; `ended` is set in place of its end."""
    monkeypatch.setattr(stop_signals, "PATIENCE", 0.5)
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
    assert not watched.ended.wait(0.8)  # nobody has told it
    signal.raise_signal(signal.SIGTERM)
    assert watched.ended.wait(30)
    assert watched.numbers == [signal.SIGTERM]


def test_a_process_that_gets_on_is_left_alone_however_long_it_takes(watched):
    signal.raise_signal(signal.SIGTERM)
    get_on(1.2)
    assert not watched.numbers


def test_a_call_may_take_twice_as_long_as_the_longest_before_it(watched):
    time.sleep(0.6)
    signal.raise_signal(signal.SIGTERM)
    assert not watched.ended.wait(0.9)
    assert watched.ended.wait(30)


def test_a_process_that_is_saving_is_not_ended(watched):
    watched.busy = True
    signal.raise_signal(signal.SIGTERM)
    assert not watched.ended.wait(0.8)
    watched.busy = False
    assert watched.ended.wait(30)


class TermInSanityCheck(Callback):
    """Sends SIGTERM to its own process before the first step."""

    def on_validation_batch_end(self, trainer, *_):
        if trainer.sanity_checking:
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_before_the_first_step_is_answered_after_it(tmp_path):
    callback = ["--trainer.callbacks+", f"{__name__}.TermInSanityCheck"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            fit_digits(tmp_path, "--data.max_count", 10, "--monitor", "null", *callback)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143
    assert read(tmp_path / "r")["global_step"] == 1
