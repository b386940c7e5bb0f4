"""Configuration files: plain data of a bounded size."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from etflight.errors import UserError
from etflight.untrusted import refuse_aliases

_MAX_VALUES = 100_000
# torch has a class of this name, too, without the `monitor` that says what it follows
_FULL_PATHS = {"ReduceLROnPlateau": "lightning.pytorch.cli.ReduceLROnPlateau"}
_load = get_loader("yaml")


def guard_parser() -> None:
    """Let every configuration that jsonargparse reads, files within files too, go through `load_yaml`."""
    set_loader("yaml", load_yaml, (yaml.YAMLError,))


def read_yaml(path: Path) -> Any:
    """The plain data of a configuration file.

    Raises:
        UserError: no text, no YAML, names of Python objects, or aliases that multiply.
    """
    try:
        return load_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, UserError) as error:
        raise UserError(f"{path} cannot be read as a configuration file: {' '.join(str(error).split())}") from error


def to_yaml(value: Any) -> str:
    """Plain data in one line that `load_yaml` reads back, every text in quotes; YAML does not know how JSON writes an emoji."""
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', width=math.inf)


def load_yaml(text: str) -> Any:
    """Plain data from YAML, as jsonargparse reads it.

    Raises:
        yaml.YAMLError: no YAML, or names of Python objects.
        UserError: more than 100,000 values with the aliases written out, or nested beyond reason.
    """
    # before anything is constructed: a merge (<<) of aliases copies what they stand for
    try:
        document = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    refuse_aliases(document, _MAX_VALUES, _parts_of)
    return _unambiguous(_load(text))


def _unambiguous(value: Any) -> Any:
    """The same data with a full path in the place of each name that two classes have."""
    if isinstance(value, dict):
        return {key: _unambiguous(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_unambiguous(part) for part in value]
    return full_path(value) if isinstance(value, str) else value


def full_path(word: str) -> str:
    """A word of a command line or a file, `name` or `--option=name`, with a full path in the place of a name that two classes have."""
    option, is_given, name = word.rpartition("=")
    return f"{option}{is_given}{_FULL_PATHS.get(name, name)}"


def _parts_of(node: object) -> Iterable[object]:
    value = node if isinstance(node, tuple) else getattr(node, "value", ())
    return value if isinstance(value, list | tuple) else ()
