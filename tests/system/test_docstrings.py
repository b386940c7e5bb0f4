"""Docstrings against the code, beyond what the linter compares: arguments of classes, and errors."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from types import FunctionType

import etflight

MODULES = [import_module(found.name) for found in walk_packages(etflight.__path__, "etflight.")]
CLASSES = [
    member
    for module in MODULES
    for name, member in vars(module).items()
    if isinstance(member, type) and member.__module__ == module.__name__ and name[0] != "_"
]
MENDABLE = {"UserError", "ValueError", "TypeError"}  # what a caller can do something about


def functions() -> Iterator[tuple[FunctionType, type | None]]:
    """Every public function, method and property, and each constructor, with its class."""
    for owner in (*MODULES, *CLASSES):
        place = owner.__module__ if isinstance(owner, type) else owner.__name__
        for name, member in vars(owner).items():
            if name[0] != "_" or name in ("__init__", "__post_init__"):
                for kind in ("fget", "func", "__func__", "__wrapped__"):  # of properties, class methods, decorators
                    member = getattr(member, kind, None) or member
                # a data class makes some, which have no file
                written = inspect.isfunction(member) and member.__code__.co_filename != "<string>"
                if written and member.__module__.startswith(place):
                    yield member, owner if isinstance(owner, type) else None


def section(documented: object, title: str) -> list[str] | None:
    """Names of the entries in a section of a Google-style docstring, None without it."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.cleandoc(documented.__doc__ or ""), re.MULTILINE)
    return found and re.findall(r"^    \*{0,2}(\w+)(?: \(.+\))?:", found[1], re.MULTILINE)


def name_of(part: type | FunctionType) -> str:
    return f"{part.__module__}.{part.__qualname__}"


def raised(function: FunctionType) -> set[str]:
    """Names of the errors that `raise` statements in the function's own body make."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def family(part: type | None) -> list[type]:
    return [base for base in part.__mro__ if base.__module__.startswith("etflight")] if part else []


def test_classes_document_their_arguments_and_no_others():
    """An inherited argument may stand in the base's docstring; that of a named tuple or data class is an attribute, too."""
    wrong = {}
    for part in CLASSES:
        start = vars(part).get("__init__")
        if issubclass(part, tuple) or getattr(start, "__module__", "").startswith(part.__module__):
            taken = set(inspect.signature(part).parameters)
            told = {
                name for base in family(part) for title in ("Args", "Attributes") for name in section(base, title) or ()
            }
            if differ := taken - told | set(section(part, "Args") or ()) - taken:
                wrong[name_of(part)] = differ
    assert wrong == {}


def test_errors_that_are_raised_are_documented():
    """At the function, at its class for all of its methods, or in words at its module or package for all of its functions."""
    wrong = {}
    for function, owner in functions():
        module = import_module(function.__module__)
        at_module = f"{module.__doc__} {import_module(module.__package__).__doc__}"
        documented = [function, *family(owner), *(vars(base).get(function.__name__) for base in family(owner))]
        errors = {error for error in raised(function) & MENDABLE if error not in at_module}
        if errors and not any(section(part, "Raises") for part in documented):
            wrong[name_of(function)] = errors
    assert wrong == {}
