"""Docstrings against the code: what `help(…)` says of arguments and errors is what there is."""

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


def functions(*special: str) -> Iterator[tuple[FunctionType, type | None]]:
    """Every public function, method and property, those special methods too, each with its class."""
    for owner in (*MODULES, *CLASSES):
        place = owner.__module__ if isinstance(owner, type) else owner.__name__
        for name, member in vars(owner).items():
            if name[0] != "_" or name in special:
                for kind in ("fget", "func", "__func__", "__wrapped__"):  # of properties, class methods, decorators
                    member = getattr(member, kind, None) or member
                # a data class makes some, which have no file
                written = inspect.isfunction(member) and member.__code__.co_filename != "<string>"
                if written and member.__module__ == place:
                    yield member, owner if isinstance(owner, type) else None


def section(documented: object, title: str) -> list[str] | None:
    """Names of the entries in a section of a Google-style docstring, None without it."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.cleandoc(documented.__doc__ or ""), re.MULTILINE)
    return found and re.findall(r"^    \*{0,2}(\w+)(?: \(.+\))?:", found[1], re.MULTILINE)


def name_of(part: type | FunctionType) -> str:
    return f"{part.__module__}.{part.__qualname__}"


def parameters(called: type | FunctionType) -> list[str]:
    names = list(inspect.signature(called).parameters)
    method = inspect.isfunction(called) and "." in called.__qualname__
    return names[1:] if method and names and names[0] in ("self", "cls") else names


def raised(function: FunctionType) -> set[str]:
    """Names of the errors that `raise` statements in the function's own body make."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def family(part: type | None) -> list[type]:
    return [base for base in part.__mro__ if base.__module__.startswith("etflight")] if part else []


def test_everything_public_has_a_docstring():
    parts = [*MODULES, *CLASSES, *(function for function, _ in functions())]
    assert len(parts) > 700
    assert [part for part in parts if not part.__doc__] == []


def test_classes_document_their_arguments_and_no_others():
    """An inherited argument may stand in the base's docstring; that of a named tuple or data class is an attribute, too."""
    wrong = {}
    for part in CLASSES:
        start = vars(part).get("__init__")
        if issubclass(part, tuple) or getattr(start, "__module__", None) == part.__module__:
            taken = set(parameters(part))
            told = {
                name for base in family(part) for title in ("Args", "Attributes") for name in section(base, title) or ()
            }
            if differ := taken - told | set(section(part, "Args") or ()) - taken:
                wrong[name_of(part)] = differ
    assert wrong == {}


def test_functions_document_all_of_their_arguments_or_none():
    """None only where one line says it all, and never where the package exports the function."""
    packages = [etflight, *(module for module in MODULES if hasattr(module, "__path__"))]
    listed = [getattr(package, name) for package in packages for name in getattr(package, "__all__", ())]
    exported = [part for part in listed if inspect.isfunction(part)]
    assert len(exported) > 40
    wrong = {}
    for function, _ in functions():
        told = section(function, "Args")
        if (told or []) != parameters(function) and (told is not None or function in exported):
            wrong[name_of(function)] = told, parameters(function)
    assert wrong == {}


def test_errors_that_are_raised_are_documented():
    """At the function, or at its class for all of its methods."""
    wrong = {}
    for function, owner in functions("__init__", "__post_init__"):
        documented = [function, *family(owner), *(vars(base).get(function.__name__) for base in family(owner))]
        if (errors := raised(function) & MENDABLE) and not any(section(part, "Raises") for part in documented):
            wrong[name_of(function)] = errors
    assert wrong == {}
