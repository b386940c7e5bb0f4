"""Reading configuration files as plain data of a bounded size."""

import math
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from etflight.utils.errors import UserError, brief
from etflight.utils.limits import refuse_aliases
from etflight.utils.shipped import shipped_configs

_MAX_VALUES = 100_000
_load = get_loader("yaml")


def guard_parser() -> None:
    """Send every configuration that jsonargparse reads, including files named within files, through `load_yaml`."""
    set_loader("yaml", load_yaml, (yaml.YAMLError,))


def read_yaml(path: Path) -> Any:
    """Read the plain data of a configuration file.

    Raises:
        UserError: There is no such file, or it is not text or not YAML, names Python objects, or has aliases that multiply.
    """
    require_file(path)
    try:
        return load_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, UserError) as error:
        raise UserError(f"{path} cannot be read as a configuration file: {brief(error, 500)}") from error


def require_file(path: Path) -> None:
    """Refuse a configuration file that does not exist.

    Raises:
        UserError: There is no such file; the message has near matches.
    """
    if not path.exists() or path.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"there is no configuration file {path}"
        there: dict[str, list[str]] = {}  # data/digits.yaml and studies/digits.yaml have one name
        for file in (*path.parent.glob("*.y*ml"), *shipped_configs()):
            there.setdefault(file.name, []).append(str(file))
        names = get_close_matches(path.with_suffix(".yaml").name, there, n=2, cutoff=0.8)
        near = ", ".join(file for name in names for file in there[name])
        hint = f": near matches: {near}" if near else ""
        raise UserError(f"{what}{hint}; etflight configs lists those that come with it")


def to_yaml(value: Any) -> str:
    """Write plain data in one line that `load_yaml` reads back, with every text in quotes.

    JSON would not do, because it writes an emoji in a way that YAML does not know.
    """
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', width=math.inf)


def load_yaml(text: str) -> Any:
    """Read plain data from YAML as jsonargparse does.

    Raises:
        yaml.YAMLError: The text is not YAML, or names Python objects.
        UserError: The text has more than 100,000 values with the aliases written out, or is nested too deeply.
    """
    # before anything is constructed: a merge (<<) of aliases copies what they stand for
    try:
        document = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    refuse_aliases(document, _MAX_VALUES, _parts_of)
    _refuse_repeated_keys(document)
    return _load(text)


def _refuse_repeated_keys(document: object) -> None:
    """Refuse a mapping that gives a key twice, of which YAML would silently take the last."""
    waiting = [document]
    while waiting:
        node = waiting.pop()
        waiting.extend(_parts_of(node))
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if repeated := [key for key, times in keys.items() if times > 1]:
                raise UserError(f"it gives {repeated[0]!r} twice: leave one out, or put what they hold together")


def _parts_of(node: object) -> Iterable[object]:
    value = node if isinstance(node, tuple) else getattr(node, "value", ())
    return value if isinstance(value, list | tuple) else ()
