"""Ending a process that waits for others of its job and cannot answer a signal itself."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from select import select
from types import CodeType

PATIENCE = 40.0  # seconds


class Watchdog(threading.Thread):
    """Ends a process that has got SIGTERM or SIGINT, but whose main thread comes back from no call any more.

    Python runs signal handlers in the main thread, and only between two of its instructions: a process that waits in a collective for
    another which has stopped taking part never sees the signal. This thread does, through the wake-up file that C's own handler
    writes to.

    What counts as progress is that the main thread gets on: from one call to another, in whatever part of the program. It is taken to
    wait for ever once it has been in one and the same call for 40 seconds after the signal, and for twice as long as it ever was in
    one before. So a long validation, a sweep or a figure is not cut short, nor a long step of a big model, unless it is the first one
    of all, before which nothing is lost; and whoever `is_busy` may take its time.

    Args:
        is_busy: whether the main thread does something, such as saving, that must not be cut short.
        end: called with the signal's number, in this thread.
        interval: seconds between two looks.

    Source:
        "Execution of Python signal handlers" and `set_wakeup_fd`, https://docs.python.org/3/library/signal.html
    """

    def __init__(self, is_busy: Callable[[], bool], end: Callable[[int], None], interval: float = 1.0) -> None:
        super().__init__(name="etflight-watchdog", daemon=True)
        self._is_busy, self._end, self._interval = is_busy, end, interval
        self._main = threading.main_thread().ident or 0
        self._inbox, outbox = os.pipe()
        os.set_blocking(outbox, False)
        self._outbox, self._before = outbox, signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        self._is_over = False

    def run(self) -> None:
        """Look at the main thread until the process ends, or `stop`."""
        place, since, longest, number, told = self._place(), time.monotonic(), 0.0, 0, 0.0
        while not self._is_over:
            ready, _, _ = select([self._inbox], [], [], self._interval)
            now, here = time.monotonic(), self._place()
            received = {signal.SIGTERM, signal.SIGINT} & {*(os.read(self._inbox, 64) if ready else b"")}
            if received and not number:
                number, told = max(received), now
            if here != place or self._is_busy():
                longest, place, since = max(longest, now - since), here, now
            if number and not self._is_over and now - max(since, told) > max(PATIENCE, 2 * longest):
                self._end(number)
                return

    def stop(self) -> None:
        """Look no more; the main thread calls it."""
        if self._is_over:
            return
        self._is_over = True
        signal.set_wakeup_fd(self._before)
        os.write(self._outbox, b"\0")
        self.join()
        os.close(self._inbox)
        os.close(self._outbox)

    def _place(self) -> list[tuple[CodeType, int]]:
        """Where the main thread is: each function on its stack, with the instruction."""
        place, frame = [], sys._current_frames().get(self._main)
        while frame is not None:
            place.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        return place
