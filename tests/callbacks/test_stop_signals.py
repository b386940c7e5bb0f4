"""A process that gets a signal ends in order where it can; one that waits for ever is told from one that gets on."""

import signal

import pytest
from lightning.pytorch import Callback

from etflight.callbacks.stop_signals import PATIENCE, Patience, Watchdog
from tests.left_by_runs import read
from tests.training import fit_digits


def test_a_process_in_a_call_that_never_ends_is_stuck_once_it_was_told():
    patience = Patience(0, "call")
    assert not any(patience.is_over(now, "call") for now in range(1000))  # nobody has told it
    assert not patience.is_over(1000, "call", is_told=True)
    assert not patience.is_over(1000 + PATIENCE, "call")
    assert patience.is_over(1001 + PATIENCE, "call")


def test_a_process_that_gets_on_is_left_alone_however_long_it_takes():
    patience = Patience(0, 0)
    assert not any(patience.is_over(now, now // PATIENCE, is_told=True) for now in range(1000))


def test_a_call_may_take_twice_as_long_as_the_longest_before_it():
    patience = Patience(0, "long")
    assert not patience.is_over(2 * PATIENCE, "long")
    assert not patience.is_over(3 * PATIENCE, "next", is_told=True)
    assert not patience.is_over(9 * PATIENCE, "next")
    assert patience.is_over(9 * PATIENCE + 1, "next")


def test_a_process_that_is_saving_is_not_stuck():
    patience = Patience(0, "call")
    assert not any(patience.is_over(now, "call", is_busy=True, is_told=True) for now in range(1000))
    assert not patience.is_over(999 + PATIENCE, "call")
    assert patience.is_over(1000 + PATIENCE, "call")


def test_the_watch_leaves_the_process_as_it_was():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    watchdog = Watchdog(lambda: False, lambda number: None)
    watchdog.start()
    watchdog.stop()
    watchdog.stop()  # again does no harm
    assert signal.set_wakeup_fd(before) == before


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
