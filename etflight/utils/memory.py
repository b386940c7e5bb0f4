"""What the C library does with memory that this process has freed."""

import ctypes
import os

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what large tensors free, for the tensors of the next step.

    By itself it returns each to the system and asks for it again, and the kernel has to clear every page. A user's own settings of glibc's
    `malloc` win, and `ETFLIGHT_KEEP_MEMORY=0` leaves it as it is. Another allocator and another C library do not notice.

    Returns:
        Whether glibc will.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if is_set or os.environ.get("ETFLIGHT_KEEP_MEMORY") == "0" or set_option is None:
        return False
    return bool(set_option(_MMAP_MAX, 0)) and bool(set_option(_TRIM_THRESHOLD, -1))  # no tensor a mapping, never trim
