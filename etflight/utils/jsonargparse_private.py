"""Putting jsonargparse's messages into one line; their wording is not part of its public interface."""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import takewhile

from etflight.utils.classes import family

_MOST = 400  # characters of a reason that is told as the parser gives it


def in_one_line(message: str, bases: Mapping[str, type]) -> str:
    r"""Write the option, the reason and the value in one line, with near matches for a name that does not exist.

    Args:
        message: The text of an error of the parser, often of many lines.
        bases: For each option that takes a class by its name, the base of that class.

    Example:
        >>> in_one_line('Parser key "data":\n  Parser key "batch_size":\n    Expected a <class \'int\'>. Got value: x', {})
        '--data.batch_size: expected int, got x'
    """
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    reason, prefix = _innermost(message), f"--{key}: " if key else ""
    if option := re.search(r"Option '([^']+)' is not accepted", reason):
        chosen = re.findall(r"class_path[= ]'([\w.]+)'", reason)
        near = _near_matches(option[1], _arguments(chosen[-1]) if chosen else [])
        return f"--{key}{'.' if key else ''}{option[1]}: there is no such option{near}"
    if missing := re.search(r"arguments are required: (.+?)(\. Got value.*)?$", reason, re.MULTILINE):
        names = [f"{key}.{name}" if key else name for name in missing[1].split(", ")]
        names = names if key else [name.partition(".")[2] or name for name in names]  # without the stage
        options = [f"--{name}" if key or name in bases else name for name in names]
        return f"these arguments are required: {', '.join(options)}"
    if told := re.search(r"Multiple subclasses with name .*|Problem with given class_path '[\w.]+':\n.*", reason):
        return prefix + " ".join(told[0].split())
    types = re.findall(r"(?:Expected an? (?:<class '(?:[\w.]*\.)?|typing\.)|Not of type )(\w+(?:\[[^\]]*\])?)", reason)
    expected = " or ".join(dict.fromkeys(types))
    name = re.search(r"Expected a path but (\S+) either|Expected a dot import path string: (\S+)", reason)
    if name and not {*types} - {"list", "NoneType"}:
        given = name[1] or name[2]
        kind, known = (bases[key].__name__, _names(bases[key])) if key in bases else ("class", [])
        hint = _near_matches(given, known) or (f"; there are {', '.join(known)}" if known else "")
        return f"{prefix}{given!r} names no {kind} that can be made{hint}"
    if not expected:
        return prefix + " ".join(reason.split())[:_MOST]
    values = dict(re.findall(r"(Given|Got) value: (.*?)(?:\. Got value: .*)?$", reason, re.MULTILINE))
    value = values.get("Given") or values.get("Got")
    return f"{prefix}expected {expected}{f', got {value}' if value else ''}"


def _innermost(message: str) -> str:
    """The lines about the innermost key, without those about other types that an outer key could have."""
    lines = [line for line in re.split(r'Parser key "[^"]+":', message)[-1].splitlines() if line.strip()]
    depth = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(takewhile(lambda line: line.startswith(" " * depth), lines))


def _near_matches(name: str, known: Iterable[str]) -> str:
    """Write `; near matches: …` with the known names that are near to another one; empty if none is."""
    by_lower = {path.rpartition(".")[2].lower(): path for path in known if path != name}
    close = get_close_matches(name.rpartition(".")[2].lower(), by_lower, n=3, cutoff=0.4)
    return f"; near matches: {', '.join(by_lower[one] for one in close)}" if close else ""


def _arguments(path: str) -> list[str]:
    """The arguments of a class that has been imported."""
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(sys.modules.get(module), name, object)).parameters)


def _names(base: type) -> list[str]:
    """The names of the subclasses that can be made; a user's own with its module, without which the parser would not find it."""
    usable = [cls for cls in family(base) if not getattr(cls, "__abstractmethods__", None) and cls.__name__[0] != "_"]
    known = ("etflight", "torch", "lightning")
    return sorted(
        {c.__name__ if c.__module__.partition(".")[0] in known else f"{c.__module__}.{c.__qualname__}" for c in usable}
    )
