"""Waiting for what another process or thread does, with one generous deadline."""

import subprocess
import time
from collections.abc import Callable

DEADLINE = 300.0  # seconds; only a promise that is broken is waited for so long


def wait_until(condition: Callable[[], object], *, process: subprocess.Popen[str] | None = None) -> None:
    """Return as soon as the condition is true.

    Args:
        condition: What is waited for, asked again and again.
        process: The process that is to bring it about, if it may end too early.

    Raises:
        AssertionError: The process has ended without it, or the deadline is over.
    """
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process is None or process.poll() is None or condition(), process.communicate()
        assert time.monotonic() < end, f"not so after {DEADLINE:g} s"
        time.sleep(0.02)
