"""Checks on what somebody else may have written: it names no code, and does not grow without bound."""

import inspect
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from etflight.utils.errors import UserError

# annotations for which the command line's parser takes a text as it stands
_TEXT_STAYS_TEXT = (str, int, float, bool, NoneType, Path)
_MAX_GROWTH = 100  # images and labels are compressed by 2 to 10
_MAX_SMALL = 2**28  # bytes that any machine has: blank images of a test may be compressed by 1000


def texts(value: object) -> Iterator[str]:
    """Every string in nested dicts (their keys too), lists and tuples."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part)


def refuse_names(cls: type, arguments: Mapping[str, Any], argument: str) -> None:
    """Refuse texts that the command line's parser could take for the name of code, and import.

    For an argument of text or numbers any text will do. For any other it must be one word: `"mod.fn"` would be imported for a
    function, `"{class_path: mod.C}"` for an argument of any type.

    Args:
        cls: what is to be called.
        arguments: plain data for its arguments.
        argument: name of what was given, for the error.

    Raises:
        UserError: such a text.
    """
    for name, value in arguments.items():
        suspicious = next((text for text in texts(value) if not re.fullmatch(r"[\w-]*", text)), None)
        if suspicious is not None and not _takes_text(cls, name):
            raise UserError(
                f"{argument}: the text {suspicious!r} for {name} of {cls.__name__} could name code, which no checkpoint may: "
                "nothing was imported"
            )


def _takes_text(cls: type, name: str) -> bool:
    """Whether the annotation of an argument, of the class or of one it inherits from, is made of text and numbers only."""
    for owner in inspect.getmro(cls):
        constructor = vars(owner).get("__init__")
        if name in getattr(constructor, "__annotations__", {}):
            try:
                return _is_text(get_type_hints(constructor)[name])
            except (NameError, TypeError):  # an annotation that only a type checker can read
                return False
    return False


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal or annotation is Ellipsis:
        return True
    parts = get_args(annotation)
    return all(map(_is_text, parts)) if parts else annotation in _TEXT_STAYS_TEXT


def refuse_growth(what: str, unpacked: int, packed: int) -> None:
    """Refuse compressed data that is made to fill the memory, before any is set aside.

    Args:
        what: the data, for the error.
        unpacked: bytes that it says it unpacks to.
        packed: bytes that there are.

    Raises:
        UserError: more than 256 MiB, and more than 100 times what there is.
    """
    if unpacked > max(_MAX_SMALL, _MAX_GROWTH * packed):
        raise UserError(
            f"{what} says it unpacks from {packed:,} bytes to {unpacked:,}: refused, no images are like that"
        )


def inflate(what: str, packed: bytes) -> bytes:
    """Unpack zlib's format, as far as `refuse_growth` lets it.

    Args:
        what: the data, for the error.
        packed: the compressed bytes.

    Raises:
        UserError: they grow too much.
        zlib.error: they are damaged.
    """
    most = max(_MAX_SMALL, _MAX_GROWTH * len(packed))
    unpacked = zlib.decompressobj().decompress(packed, most + 1)
    refuse_growth(what, len(unpacked), len(packed))
    return unpacked


def parts_of(value: object) -> Iterable[object]:
    """What plain data holds: the values of a dict, the items of a list or tuple, of anything else nothing."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def refuse_aliases(value: object, most: int, parts_of: Callable[[object], Iterable[object]] = parts_of) -> None:
    """Refuse nested data in which the same part stands in so many places that walking through it would not end.

    Args:
        value: the data.
        most: how many values it may have with every part written out wherever it stands.
        parts_of: what a value holds.

    Raises:
        UserError: more, or nested beyond what Python can walk.
    """
    known: dict[int, int] = {}

    def written_out(part: object) -> int:
        if id(part) not in known:
            known[id(part)] = most  # seen from inside itself, it has no end
            known[id(part)] = 1 + sum(map(written_out, parts_of(part)))
        if known[id(part)] > most:
            raise UserError(f"it has parts that stand for more than {most:,} values")
        return known[id(part)]

    try:
        written_out(value)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
