"""Putting jsonargparse's messages into one line; their wording is not part of its public interface."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile

from etflight.utils.classes import family

_FEW = 24  # names that one line can hold


def in_one_line(message: str, bases: Mapping[str, type]) -> str:
    r"""Write the option, the reason and the value in one line, with near matches for a class that does not exist.

    Args:
        message: The text of an error of the parser, often of many lines.
        bases: For each option that takes a class by its name, the base of that class.

    Example:
        >>> in_one_line('Parser key "data":\n  Parser key "batch_size":\n    Expected a <class \'int\'>. Got value: x', {})
        '--data.batch_size: Expected an int, got x'
    """
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    if linked := re.search(r'Linked "([^"]+)" must be given via "([^".]+)', message):
        return f"--{linked[1]} is taken from --{linked[2]}: leave it out"
    if key in bases and "is abstract" in message:
        return f"--{key}: say which: {', '.join(_names(bases[key]))}"
    reason = _innermost(message)
    if whole := re.match(r'\s*Unable to load config "(.*)"', reason):
        return f"--{key} {whole[1]}: {mend_of_section(key)}"
    if alien := re.search(r"Option '([^']+)' is not accepted", reason):
        chosen = re.findall(r"class_path[= ]'([\w.]+)'", reason)
        name = chosen[-1].rpartition(".")[2] if chosen else "the chosen class"
        known = _arguments(chosen[-1]) if chosen else []
        option = f"--{'.'.join(filter(None, (key, alien[1])))}"
        if alien[1] in known:  # the parser leaves out what the model gives its parts
            return f"{option}: {name} gets it from the data and the network: leave it out"
        return f"{option}: {name} takes no argument {alien[1]!r}{_near(alien[1], known)}"
    if missing := re.search(r"the following arguments are required: (.+?)(\. Got value.*)?$", reason, re.MULTILINE):
        names = [name.rpartition(".")[2] for name in missing[1].split(", ")]
        options = [f"--{key}.{name}" if key else f"--{name}" if name in bases else name for name in names]
        return f"these arguments are required: {', '.join(options)}"
    if ambiguous := re.search(r"Multiple subclasses with name .*", reason):
        return f"--{key}: {ambiguous[0]}"
    # an option of numbers may also take a tensor, by the path of its class
    takes_number = re.search(r"Expected a <class '(float|int)'>", reason)
    unknown = re.search(r"Expected a path but (\S+) either|Expected a dot import path string: (\S+)", reason)
    if unknown and not takes_number:
        name = unknown[1] or unknown[2]
        why = re.search(r"No module named '[^']+'|module '[^']+' has no attribute '[^']+'", reason)
        if not why and key in bases and _imported(name) is not None:
            return f"--{key}: {name} is no {bases[key].__name__}: derive it from {_full_name(bases[key])}"
        return f"--{key}: nothing is called {name!r}{f' ({why[0]})' if why else ''}{_hint(name, bases.get(key))}"
    given, got = (rf"{said} value: (.*?)(\. Got value: .*)?$" for said in ("Given", r"\. Got"))
    value = re.search(given, reason, re.MULTILINE) or re.search(got, reason, re.MULTILINE)
    lines = [line.partition(". Got value: ")[0].strip(" -") for line in reason.splitlines()]
    expected = [line.removeprefix("Expected ") for line in lines if re.match(r"Expected (?!a path|a dot import)", line)]
    text = f"Expected {' or '.join(dict.fromkeys(expected))}" if expected else lines[0]
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("a NoneType", "null").replace("a int", "an int")
    text = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    return f"{f'--{key}: ' if key else ''}{text[:400]}{f', got {_as_typed(value[1])}' if value else ''}"


def mend_of_section(section: str) -> str:
    """Say what to give in place of a value for an option that only has options below it."""
    return f"it only has options below it: give these, such as --{section}.NAME, or leave it out"


def why_not_made(message: str) -> str | None:
    """Say which class the parser could not instantiate, and why; None for errors of another kind."""
    found = re.search(r"Problem with given class_path '[\w.]*?(\w+)':\s+(.+)", message)
    return found and f"{found[1]} cannot be made: {found[2]}"


def _innermost(message: str) -> str:
    """The lines about the innermost key, without those about other types that an outer key could have."""
    message = re.sub(
        r"Not of type PositiveInt: (?:(?:(\S+) )?does not conform to .*|invalid literal for int\(\) with base 10: '(.*)')",
        lambda found: (
            f"Expected a positive int{f'. Got value: {found[1] or found[2]}' if found[1] or found[2] else ''}"
        ),
        message,
    )
    lines = [line for line in re.split(r'Parser key "[^"]+":', message)[-1].splitlines() if line.strip()]
    depth = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(takewhile(lambda line: line.startswith(" " * depth), lines))


def _as_typed(value: str) -> str:
    """Write a value of the parser as a user would write it."""
    nested = re.fullmatch(r"NestedArg\(key='(.+)', val='(.*)'\)", value)
    return f"{nested[1]} {nested[2]}" if nested else "null" if value == "None" else value or "nothing"


def _hint(name: str, base: type | None) -> str:
    """Write `; near matches: …` from the names that an option takes, or all of these names if they are few."""
    known = [] if base is None else _names(base)
    paths = {path.rpartition(".")[2]: path for path in known}
    if near := _near(name.rpartition(".")[2], list(paths), paths):
        return near
    return f"; there are {', '.join(known)}" if 0 < len(known) <= _FEW else ""


def _near(name: str, known: Sequence[str], written: Mapping[str, str] | None = None) -> str:
    close = get_close_matches(name.lower(), by_lower := {one.lower(): one for one in known}, n=3, cutoff=0.4)
    names = [(written or {}).get(by_lower[one], by_lower[one]) for one in close]
    return f"; near matches: {', '.join(names)}" if names else ""


def _arguments(path: str) -> list[str]:
    """The arguments of a class that has been imported."""
    cls = _imported(path)
    return list(inspect.signature(cls).parameters) if inspect.isclass(cls) else []


def _imported(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _names(base: type) -> list[str]:
    """The names of the subclasses that can be instantiated; a user's own with its module, without which the parser would not find it."""
    usable = (cls for cls in family(base) if not getattr(cls, "__abstractmethods__", None))
    known = ("etflight", "torch", "lightning")
    names = {cls: cls.__name__ if cls.__module__.partition(".")[0] in known else _full_name(cls) for cls in usable}
    return sorted({name for cls, name in names.items() if not cls.__name__.startswith("_")})
