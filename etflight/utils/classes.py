"""Classes that have been imported."""

from collections.abc import Iterator


def family(base: type) -> Iterator[type]:
    """A class and all its subclasses that have been imported."""
    yield base
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield from family(cls)
