"""Classes as plain data: `{"class_path": …, "init_args": {…}}`, which YAML and checkpoints hold instead of objects."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import PurePath
from typing import Any

from etflight.utils.classes import family
from etflight.utils.errors import UserError, let_through

Spec = dict[str, Any]
_LARGEST = 1e30  # what an optimizer computes from it still fits float32


def to_spec(factory: object, argument: str) -> Spec:
    """Describe a class, or a `functools.partial` of one with keyword arguments, as plain data.

    Args:
        factory: A class, a partial of a class, or data that already has this form.
        argument: The name of the argument it was given for, for the error.

    Returns:
        `{"class_path": "package.module.Class", "init_args": {…}}`.

    Raises:
        UserError: It is a lambda, a function or a local class, or has positional arguments, which no file could name.
    """
    if isinstance(factory, Mapping) and isinstance(factory.get("class_path"), str):
        arguments = factory.get("init_args") or {}
        if isinstance(arguments, Mapping):
            return {"class_path": factory["class_path"], "init_args": as_plain(dict(arguments))}
    cls, args, init_args = (
        (factory.func, factory.args, factory.keywords) if isinstance(factory, partial) else (factory, (), {})
    )
    if not inspect.isclass(cls) or "<locals>" in cls.__qualname__ or args:
        raise UserError(
            f"{argument}={factory!r} cannot be written into a checkpoint: "
            "give a module-level class, or functools.partial of one with keyword arguments"
        )
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": as_plain(init_args)}


def as_plain(value: Any, *, containers: bool = False) -> Any:
    """The value with Python's own types in the place of NumPy's and torch's numbers and of subclasses, at any depth.

    Args:
        value: Any value.
        containers: Whether arrays, tensors and paths too become lists and texts.
    """
    # by its methods, since the import of torch takes seconds, which `--help` need not wait for
    if hasattr(value, "tolist") and hasattr(value, "ndim") and (containers or value.ndim == 0):
        return value.tolist()
    if isinstance(value, PurePath) and containers:
        return str(value)
    if isinstance(value, Mapping):
        return {as_plain(key): as_plain(inner, containers=containers) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        kind = tuple if isinstance(value, tuple) else list
        return kind(as_plain(inner, containers=containers) for inner in value)
    if isinstance(value, str):
        return str.__str__(value)  # the value of an enumeration, not its name
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return float(value) if isinstance(value, float) else int(value)
    return value


@contextmanager
def objections(spec: Spec, argument: str) -> Iterator[None]:
    """Turn any error of a class about its arguments, within the block, into one line that names them.

    Raises:
        UserError: The block raised any exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        let_through(error)
        name = spec["class_path"].rpartition(".")[2]
        given = ", ".join(f"{key}={value!r}" for key, value in spec["init_args"].items())
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{argument}: {name}({given}) cannot work: {reason}") from error


class Maker(partial[Any]):
    """A class with bound arguments; errors of its constructor become a `UserError`."""

    argument: str

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        """Make an object of the class."""
        with self.objections():
            return super().__call__(*args, **keywords)

    def objections(self) -> AbstractContextManager[None]:
        """A block of `objections` that names those arguments which differ from the defaults of the class."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(self.func).parameters.items()}
        given = {name: value for name, value in self.keywords.items() if value != defaults.get(name)}
        return objections({"class_path": self.func.__qualname__, "init_args": given}, self.argument)


def from_spec(spec: Spec, base: type, argument: str) -> Maker:
    """Return the class of a spec with its arguments bound, looked up only among subclasses of `base` that are already imported.

    Nothing is imported and nothing but the constructor can be called, so a spec from a file that somebody else wrote is safe.

    Raises:
        UserError: There is no such class, its arguments are no plain data, or a number is NaN or beyond 1e30.
    """
    path, init_args = spec["class_path"], spec["init_args"]
    cls = find_class(spec, base)
    if cls is None:
        raise UserError(
            f"{argument}: no {base.__name__} called {path} has been imported: import its module before "
            f"(--imports {path.rpartition('.')[0]}; in fit, validate, test and predict --model.{argument} {path})"
        )
    _check_arguments(cls, init_args, argument)
    maker = Maker(cls, **init_args)
    maker.argument = argument
    return maker


def find_class(spec: Spec, base: type) -> type | None:
    """The class of a spec, or None if no such subclass of `base` has been imported."""
    return next((cls for cls in family(base) if _is_named(cls, spec["class_path"])), None)


def class_called(name: str, base: type) -> type | None:
    """The only subclass of `base` with this name or path, whose module is imported; None if there is none, or several."""
    module, _, _ = name.rpartition(".")
    if module:
        with suppress(ImportError):
            import_module(module)
    found = [cls for cls in family(base) if _is_named(cls, name) or cls.__qualname__ == name]
    return found[0] if len(found) == 1 else None


def is_plain(value: object) -> bool:
    """Whether a value is made of None, booleans, numbers, strings, lists and string-keyed dicts without class paths."""
    if isinstance(value, Mapping):
        return "class_path" not in value and all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_named(cls: type, path: str) -> bool:
    module, _, name = path.rpartition(".")
    # a package may re-export the class: torch.optim.SGD lives in torch.optim.sgd
    return name == cls.__qualname__ and f"{cls.__module__}.".startswith(f"{module}.") and module != ""


def _check_arguments(cls: type, init_args: dict[str, Any], argument: str) -> None:
    if not is_plain(init_args):
        raise UserError(f"{argument}: the arguments of {cls.__name__} are not plain data: {init_args!r}")
    parameters = inspect.signature(cls).parameters
    for name, value in init_args.items():
        default = parameters[name].default if name in parameters else None
        if value is None and default not in (None, inspect.Parameter.empty):
            raise UserError(f"{argument}: {name} of {cls.__name__} is null: give a value, or leave it out")
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, float) and not abs(number) <= _LARGEST for number in numbers):
            raise UserError(f"{argument}: {name} of {cls.__name__} is {value}: give a number within ±{_LARGEST:g}")
