"""Checks on data that somebody else may have written: it must not name code or grow without bound."""

import inspect
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from etflight.utils.errors import UserError

# annotations for which the command line's parser keeps a text as it is
_TEXT_STAYS_TEXT = (str, int, float, bool, NoneType, Path)
_MAX_GROWTH = 100  # images and labels are compressed by 2 to 10
_MAX_SMALL = 2**28  # bytes; every machine has that many, and blank images of a test may be compressed by 1000


def fits(value: object, shape: Any) -> bool:
    """Whether plain data have a shape.

    Args:
        value: The data.
        shape: A type, `[shape of each item]`, `{shape of each key: shape of each value}`, or a tuple of such shapes, one of which it is.

    Example:
        >>> fits({"a": [1, 2]}, {str: [int]}), fits([1, True], [int]), fits(None, (str, type(None)))
        (True, False, True)
    """
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list | tuple) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        ((of_keys, of_values),) = shape.items()
        return isinstance(value, dict) and fits([*value], [of_keys]) and fits([*value.values()], [of_values])
    return isinstance(value, shape) and (shape is object or not isinstance(value, bool))


def texts(value: object) -> Iterator[str]:
    """Yield every string in nested dicts (their keys too), lists and tuples."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part)


def refuse_names(cls: type, arguments: Mapping[str, Any], argument: str) -> None:
    """Refuse texts that the command line's parser could take for the name of code and import.

    An argument of text or numbers may have any text. For any other argument a text must be one word: `"mod.fn"` would be imported for a
    function, `"{class_path: mod.C}"` for an argument of any type.

    Args:
        cls: The class to be called.
        arguments: Plain data for the arguments of `cls`.
        argument: The name of the option they were given for, for the error.

    Raises:
        UserError: There is such a text.
    """
    for name, value in arguments.items():
        suspicious = next((text for text in texts(value) if not re.fullmatch(r"[\w-]*", text)), None)
        if suspicious is not None and not _takes_text(cls, name):
            raise UserError(
                f"{argument}: the text {suspicious!r} for {name} of {cls.__name__} could name code: nothing was imported"
            )


def _takes_text(cls: type, name: str) -> bool:
    """Whether the annotation of an argument consists of text and numbers only."""
    try:
        argument = inspect.signature(cls, eval_str=True).parameters.get(name)
    except (NameError, TypeError):  # an annotation that only a type checker can read
        return False
    return argument is not None and _is_text(argument.annotation)


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal or annotation is Ellipsis:
        return True
    parts = get_args(annotation)
    return all(map(_is_text, parts)) if parts else annotation in _TEXT_STAYS_TEXT


def refuse_growth(what: str, unpacked: int, packed: int) -> None:
    """Refuse compressed data that is made to fill the memory, before any memory is allocated.

    Args:
        what: The name of the data, for the error.
        unpacked: The number of bytes that it claims to unpack to.
        packed: The number of bytes that it has.

    Raises:
        UserError: It unpacks to more than 256 MiB, and to more than 100 times its size.
    """
    if unpacked > max(_MAX_SMALL, _MAX_GROWTH * packed):
        raise UserError(
            f"{what} says it unpacks from {packed:,} bytes to {unpacked:,}: refused, no images are like that"
        )


def inflate(what: str, packed: bytes) -> bytes:
    """Unpack zlib's format, within the limits of `refuse_growth`.

    Args:
        what: The name of the data, for the error.
        packed: The compressed bytes.

    Raises:
        UserError: They grow too much.
        zlib.error: They are damaged.
    """
    most = max(_MAX_SMALL, _MAX_GROWTH * len(packed))
    unpacked = zlib.decompressobj().decompress(packed, most + 1)
    refuse_growth(what, len(unpacked), len(packed))
    return unpacked


def parts_of(value: object) -> Iterable[object]:
    """The parts of plain data: the values of a dict, the items of a list or tuple, nothing for anything else."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def refuse_aliases(value: object, most: int, parts_of: Callable[[object], Iterable[object]] = parts_of) -> None:
    """Refuse nested data in which the same part stands in so many places that walking through it would not end.

    Args:
        value: The data.
        most: The number of values it may have if every part is written out wherever it stands.
        parts_of: A function that returns the parts of a value.

    Raises:
        UserError: It has more values, or is nested more deeply than Python can walk.
    """
    known: dict[int, int] = {}

    def written_out(part: object) -> int:
        if id(part) not in known:
            known[id(part)] = most  # a part that contains itself has no end
            known[id(part)] = 1 + sum(map(written_out, parts_of(part)))
        if known[id(part)] > most:
            raise UserError(f"it has parts that stand for more than {most:,} values")
        return known[id(part)]

    try:
        written_out(value)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
