"""Models that are made to be filled: what their weights bring is neither computed nor fetched."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_weights_come_next = ContextVar("_weights_come_next", default=False)


@contextmanager
def weights_come_next() -> Iterator[None]:
    """Let models that are made within the block compute no sphere codes, which can take minutes, and fetch no weights.

    It is for models whose state dict is loaded next.
    """
    before = _weights_come_next.set(True)
    try:
        yield
    finally:
        _weights_come_next.reset(before)


def do_weights_come_next() -> bool:
    """Whether a block of `weights_come_next` is running."""
    return _weights_come_next.get()
