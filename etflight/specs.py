"""Classes as plain data: `{"class_path": …, "init_args": {…}}`, what YAML and checkpoints hold instead of objects."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from etflight.errors import UserError

Spec = dict[str, Any]


def describe(factory: object, argument: str) -> Spec:
    """Plain data for a class or a `functools.partial` of one with keyword arguments.

    Args:
        factory: a class, a partial of a class, or data that already has this form.
        argument: name of the argument it was given for, for the error.

    Returns:
        `{"class_path": "package.module.Class", "init_args": {…}}`.

    Raises:
        UserError: a lambda, a function, a local class, or positional arguments, which no file could name.
    """
    if isinstance(factory, Mapping) and isinstance(factory.get("class_path"), str):
        return {"class_path": factory["class_path"], "init_args": dict(factory.get("init_args") or {})}
    cls, args, init_args = (
        (factory.func, factory.args, factory.keywords) if isinstance(factory, partial) else (factory, (), {})
    )
    if not inspect.isclass(cls) or "<locals>" in cls.__qualname__ or args:
        raise UserError(
            f"{argument}={factory!r} cannot be written into a checkpoint: "
            "give a module-level class, or functools.partial of one with keyword arguments"
        )
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(init_args)}


def resolve(spec: Spec, base: type, argument: str) -> Callable[..., Any]:
    """The class of a spec with its arguments bound, looked up only among subclasses of `base` that are already imported.

    Nothing is imported and nothing but the constructor can be called, so a spec from a file that somebody else wrote is safe.

    Raises:
        UserError: no such class, or arguments it does not take.
    """
    path, init_args = spec["class_path"], spec["init_args"]
    for cls in _subclasses(base):
        if _is_named(cls, path):
            _check_arguments(cls, init_args, argument)
            return partial(cls, **init_args)
    raise UserError(
        f"{argument}: no {base.__name__} called {path!r} has been imported: import its module before, "
        f"or name it on the command line (--model.{argument} {path})"
    )


def is_known(spec: Spec, base: type) -> bool:
    """Whether `resolve` would find the class."""
    return any(_is_named(cls, spec["class_path"]) for cls in _subclasses(base))


def is_plain(value: object) -> bool:
    """Whether a value is made of None, booleans, numbers, strings, lists and string-keyed dicts without class paths."""
    if isinstance(value, Mapping):
        return "class_path" not in value and all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _subclasses(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield from _subclasses(cls)


def _is_named(cls: type, path: str) -> bool:
    module, _, name = path.rpartition(".")
    # a package may re-export the class: torch.optim.SGD lives in torch.optim.sgd
    return name == cls.__qualname__ and f"{cls.__module__}.".startswith(f"{module}.") and module != ""


def _check_arguments(cls: type, init_args: dict[str, Any], argument: str) -> None:
    if not is_plain(init_args):
        raise UserError(f"{argument}: the arguments of {cls.__name__} are not plain data: {init_args!r}")
    parameters = inspect.signature(cls).parameters
    unknown = [name for name in init_args if name not in parameters]
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise UserError(
            f"{argument}: {cls.__name__} takes no argument {unknown[0]!r}; it takes {', '.join(parameters)}"
        )
