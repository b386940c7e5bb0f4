"""The arguments of a `Classifier` as plain data: written into checkpoints, compared, and read from those of others."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from textwrap import shorten
from typing import Any, ClassVar, Protocol, TypeVar

from etflight.checkpoint.specs import as_plain, find_class, is_plain, to_spec
from etflight.utils.errors import UserError, argument
from etflight.utils.limits import refuse_names

Made = TypeVar("Made")
# timm's arguments with a source of other weights; a checkpoint has its own
_WEIGHT_SOURCES = {
    "checkpoint_path", "cache_dir", "url", "file", "state_dict", "source", "hf_hub_id", "hf_hub_filename", "custom_load",
}  # fmt: skip


class Pluggable(Protocol):
    """A class of models whose parts are classes.

    Attributes:
        PLUGGABLE: The arguments that take a class, and the base of that class.
    """

    PLUGGABLE: ClassVar[Mapping[str, type]]


def require(given: Mapping[str, Any], name: str, holds: Callable[[Any], bool], mend: str) -> None:
    """Refuse an argument that no training can use, before a network is built or its weights are downloaded.

    Args:
        given: The arguments by name.
        name: The argument.
        holds: Whether a value is fine; a `TypeError` says that it is of another kind.
        mend: What to give instead.

    Raises:
        UserError: The value is not fine.
    """
    try:
        fine = holds(given[name])
    except TypeError:
        fine = False
    if not fine:
        raise UserError(f"{name} is {given[name]}: {mend}")


def plain_arguments(given: Mapping[str, Any], model: type[Pluggable]) -> dict[str, Any]:
    """Return arguments as plain data. Those of a subclass that are not plain are left out: whoever loads the model gives them again.

    Args:
        given: The arguments by name.
        model: The class whose own arguments must all be plain.

    Raises:
        UserError: One of these is not.
    """
    plain: dict[str, Any] = {}
    own = inspect.signature(model).parameters
    for name, value in given.items():
        if name in model.PLUGGABLE and value is not None:
            plain[name] = to_spec(value, name)
        elif is_plain(value := as_plain(value, containers=name in own)):
            plain[name] = value
        elif name in own:
            raise UserError(
                f"{name}={shorten(repr(value), 100)} cannot be written into a checkpoint: give numbers, texts, lists or dicts of these"
            )
    return plain


def differing(saved: Mapping[str, Any], own: Mapping[str, Any], model: type[Pluggable]) -> list[str]:
    """Return the names of the arguments of a model in which a checkpoint differs; one that is left out is at its default."""
    parameters = inspect.signature(model).parameters if saved else {}
    full = partial(_with_defaults, model.PLUGGABLE)
    both = {name: (saved.get(name, parameters[name].default), own[name]) for name in parameters if name in own}
    return [name for name, (one, other) in both.items() if full(name, one) != full(name, other)]


def _with_defaults(pluggable: Mapping[str, type], name: str, value: Any) -> Any:
    if name not in pluggable or value is None:
        return _as_lists(_without_weights(value) if name == "model_kwargs" else value)
    spec = to_spec(value, name)
    cls = find_class(spec, pluggable[name])
    parameters = {} if cls is None else inspect.signature(cls).parameters
    given = {key: parameter.default for key, parameter in parameters.items()} | spec["init_args"]
    return cls or spec["class_path"], _as_lists(given)


def _as_lists(value: Any) -> Any:
    """The value with lists in the place of tuples, which YAML does not know."""
    if isinstance(value, Mapping):
        return {key: _as_lists(inner) for key, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def plain_hyperparameters(
    checkpoint: dict[str, Any], model: type[Pluggable], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a checkpoint's constructor arguments, checked to be plain data that names no code and asks for no other weights.

    Args:
        checkpoint: The content, as `read_checkpoint` returns it.
        model: The class that takes them.
        given: Arguments of the caller, which replace the saved ones.

    Raises:
        UserError: There is anything else, or a backbone that is described outside of timm and not `given`.
    """
    given = given or {}
    saved = {k: v for k, v in checkpoint["hyper_parameters"].items() if k != "_instantiator" and k not in given}
    for name, value in saved.items():
        spec = to_spec(value, name) if name in model.PLUGGABLE and value is not None else None
        if not is_plain(spec["init_args"] if spec else value):
            raise UserError(f"the checkpoint's hyper-parameter {name} is not plain data: {value!r}")
        if spec is None:
            refuse_names(
                _class_with_argument(model, name),
                {name: _without_weights(value) if name == "model_kwargs" else value},
                "model",
            )
        elif (cls := find_class(spec, model.PLUGGABLE[name])) is not None:
            refuse_names(cls, spec["init_args"], name)
    if isinstance(backbone := saved.get("backbone"), str) and ":" in backbone:
        raise UserError(
            f"the checkpoint's backbone {backbone} is described outside of timm: name it yourself if you trust it "
            f"({argument('model.backbone', backbone)})"
        )
    if "model_kwargs" in saved:
        saved["model_kwargs"] = _without_weights(saved["model_kwargs"])
    if "pretrained" in saved:
        saved["pretrained"] = False
    return {**saved, **given}


def fixed_by(model: type) -> set[str]:
    """The names of the arguments of a model's bases that the model itself does not take."""
    taken = inspect.signature(model).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return set()
    return {name for cls in model.__mro__[1:-1] for name in inspect.signature(cls).parameters} - taken.keys()


def make_with(model: type[Made], saved: Mapping[str, Any], given: Mapping[str, Any]) -> Made:
    """Make a model of saved arguments, without those that its class itself gives to its bases beside its `**kwargs`.

    Only Python's own error tells which these are, before a network is built.

    Args:
        model: The class.
        saved: The arguments, those `given` included.
        given: Arguments of the caller, which are never left out.
    """
    try:
        return model(**saved)
    except TypeError as error:
        twice = re.search(r"got multiple values for (?:keyword )?argument '(\w+)'", str(error))
        if twice is None or twice[1] not in saved or twice[1] in given:
            raise
    return make_with(model, {name: value for name, value in saved.items() if name != twice[1]}, given)


def _class_with_argument(model: type, name: str) -> type:
    """The class that has the argument: the model's own, or the next of its bases, to which it is passed on."""
    return next((cls for cls in model.__mro__[:-1] if name in inspect.signature(cls).parameters), model)


def _without_weights(arguments: Any) -> Any:
    if not isinstance(arguments, Mapping):
        return arguments
    return {name: _without_weights(value) for name, value in arguments.items() if name not in _WEIGHT_SOURCES}
