"""Usage errors in one line: what the parser says of a command line, and what it may have meant."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import ClassVar, NoReturn

from jsonargparse import ArgumentParser

from etflight.data import ImageDataModule
from etflight.utils.errors import user_error_in

_FEW = 24  # names that one line can hold


class OneLineParser(ArgumentParser):
    """A parser with usage errors of one line.

    Attributes:
        given: the command line, command first, in which errors find the full name of an option.
        bases: options that take a class by its name, and what it must be a subclass of.
    """

    given: ClassVar[Sequence[str]] = ()
    bases: ClassVar[Mapping[str, type]] = {"data": ImageDataModule}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and exit with status 2.

        Raises:
            UserError: a class that was built while parsing has refused its arguments.
            SystemExit: anything else.
        """
        if (wrapped := user_error_in(ex)) is not None:
            raise wrapped
        command = " ".join(["etflight", *(word for word in self.given[:1] if not word.startswith("-"))])
        print(f"etflight: error: {summarise(message, self.given, self.bases)} (see {command} --help)", file=sys.stderr)
        raise SystemExit(2)


def summarise(message: str, argv: Sequence[str], bases: Mapping[str, type]) -> str:
    r"""One line from the parser's many: the key, the reason, the value; near matches for a class that does not exist.

    Args:
        message: of jsonargparse.
        argv: the command line, which has the full name of an option where the message only has its last part.
        bases: see `OneLineParser`.

    Example:
        >>> summarise('Parser key "batch_size":\n  Expected a <class \'int\'>. Got value: x', ["--data.batch_size=x"], {})
        '--data.batch_size: Expected an int, got x'
    """
    found = re.search(r'Parser key "([^"]+)"', message)
    name = _full_name(found.group(1), argv) if found else ""
    key = f"--{name}: " if found else ""
    alien = re.fullmatch(r"Option '([^']+)' is not accepted", message.strip())
    if alien:
        return f"--{_full_name(alien.group(1), argv)}: the chosen class takes no argument {alien.group(1)!r}"
    if linked := re.search(r'Linked "([^"]+)" must be given via "([^".]+)', message):
        return f"--{linked[1]} is taken from --{linked[2]}: leave it out"
    if missing := re.fullmatch(r"the following arguments are required: (.+)", message.strip()):
        return f"these arguments are required: {', '.join(_option(name, bases) for name in missing[1].split(', '))}"
    ambiguous = re.search(r"Multiple subclasses with name [^\n]*", message)
    if ambiguous:
        return f"{key}{ambiguous.group()}"
    if name in bases and "is abstract" in message:
        return f"{key}say which: {', '.join(_names(bases[name]))}"
    unknown = re.search(r"Expected a path but (\S+) either", message)
    if unknown is None and name in bases:  # of an option that takes one of several kinds of classes
        unknown = re.search(r"Given value type: <class 'str'>\s+Given value: (\S+)", message)
    number = re.search(r"Subtypes: .*<class '(?:float|int)'>", message)  # such as "a float or a tensor"
    if unknown and not number:
        reason = re.search(r"No module named '[^']+'|module '[^']+' has no attribute '[^']+'", message)
        what = f"nothing is called {unknown.group(1)!r}{f' ({reason.group()})' if reason else ''}"
        return f"{key}{what}{_hint(unknown.group(1), bases.get(name))}"
    given = re.search(r"Given value: (.*)", message)
    lines = [re.sub(r'^Parser key "[^"]+":', "", line).strip(" -") for line in message.splitlines()]
    noise = r"Subtypes|Errors|Given value|Does not validate"
    if number:
        noise += r"|Expected a path|Expected a dot import|Not a valid subclass|Subclass types|a class path|a dict with"
    value = given or re.search(r"\. Got value: (.*)", message)
    reasons = [re.sub(r"\. Got value: .*", "", line) for line in lines if line and not re.match(noise, line)]
    reason_line = " or ".join(dict.fromkeys(reasons)).replace("<class '", "").replace("'>", "")
    reason_line = reason_line.replace(" or Expected ", " or ").replace("a NoneType", "null").replace("a int", "an int")
    reason_line = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", reason_line)
    return f"{key}{reason_line[:400]}{f', got {_as_typed(value[1])}' if value else ''}"


def _as_typed(value: str) -> str:
    """A value in the parser's words as a user would write it."""
    nested = re.fullmatch(r"NestedArg\(key='(.+)', val='(.*)'\)", value)
    return f"{nested[1]} {nested[2]}" if nested else "null" if value == "None" else value or "nothing"


def _full_name(key: str, argv: Sequence[str]) -> str:
    options = (arg.partition("=")[0].removeprefix("--") for arg in argv)
    return next((option for option in options if option.endswith(f".{key}")), key)


def _option(name: str, bases: Mapping[str, type]) -> str:
    """The option that sets an argument of a class; what no class that can be chosen takes is the command's own."""
    for option, base in bases.items():
        if name == option:
            return f"--{option}"
        if any(name in inspect.signature(cls).parameters for cls in _subclasses(base)):
            return f"--{option}.{name}"
    return name


def _hint(name: str, base: type | None) -> str:
    """`; near matches: …` among the names that an option takes, or all of them if they are few."""
    known = [] if base is None else _names(base)
    close = get_close_matches(name.rpartition(".")[2], known, n=3, cutoff=0.4)
    if close:
        return f"; near matches: {', '.join(close)}"
    return f"; there are {', '.join(known)}" if 0 < len(known) <= _FEW else ""


def _names(base: type) -> list[str]:
    """Of the subclasses that can be made."""
    usable = (cls for cls in _subclasses(base) if not getattr(cls, "__abstractmethods__", None))
    return sorted({cls.__name__ for cls in usable if not cls.__name__.startswith("_")})


def _subclasses(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [cls for child in children for cls in (child, *_subclasses(child))]
