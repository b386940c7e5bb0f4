"""Configuration files: plain data of a bounded size."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from etflight.errors import UserError
from etflight.untrusted import refuse_aliases

_MAX_VALUES = 100_000
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


def expand_overlays(argv: Sequence[str]) -> list[str]:
    """Put the files that a configuration file builds on in front of it, as if they had been given one by one.

    Args:
        argv: a command line; configuration files follow `-c` or `--config`.

    Raises:
        UserError: such a file does not exist.
    """
    expanded: list[str] = []
    for i, arg in enumerate(argv):
        if i > 0 and argv[i - 1] in ("-c", "--config"):
            for overlay in _overlays(Path(arg)):
                expanded += [str(overlay), "--config"]
        elif arg.startswith("--config="):
            for overlay in _overlays(Path(arg.partition("=")[2])):
                expanded += ["--config", str(overlay)]
        expanded.append(arg)
    return expanded


def _overlays(path: Path) -> list[Path]:
    content = read_yaml(path) if path.is_file() else None
    names = content.get("overlays") if isinstance(content, dict) else None
    found = []
    for name in names or []:
        overlay = path.parent / name
        if not overlay.is_file():
            raise UserError(f"{path} builds on {overlay}, which does not exist: mend the path in its overlays")
        found += [*_overlays(overlay), overlay]
    return found


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
    return _load(text)


def _parts_of(node: object) -> Iterable[object]:
    value = node if isinstance(node, tuple) else getattr(node, "value", ())
    return value if isinstance(value, list | tuple) else ()
