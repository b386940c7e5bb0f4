"""Command lines without torch: the parser of commands that build nothing; what an option is given, before it is parsed."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from etflight.utils.yaml import read_yaml


class CommandParser(ArgumentParser):
    """For the commands that build nothing from their options: a parser with usage errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        print(f"etflight: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def values_of(argv: Sequence[str], key: str, *short: str) -> list[str]:
    """What follows each `--key`, or one of its short forms, on the command line."""
    found = []
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        if flag in (f"--{key}", *short):
            found.append(following)
        elif flag.startswith(f"--{key}="):
            found.append(flag.partition("=")[2])
    return found


def positional(argv: Sequence[str]) -> str | None:
    """The first word that is no option and no option's value, where every option takes one value."""
    words = zip(["", *argv], argv, strict=False)
    return next((w for before, w in words if w[:1] != "-" and (before[:1] != "-" or "=" in before)), None)


def config_files(argv: Sequence[str]) -> list[Path]:
    """The configuration files, in their order."""
    return [Path(value) for value in values_of(argv, "config", "-c")]


_ARMS, _ADDITIONS = "arms", ("trainer", "logger")  # folders of configuration files


def set_and_arm(files: Sequence[Path]) -> tuple[str | None, str | None]:
    """What configuration files stand for, by their names: those before the arm make the set, the arm and those after it the arm.

    Files of a folder `trainer` or `logger` count as neither.

    Args:
        files: in their order.

    Example:
        >>> set_and_arm([Path("configs/data/cifar10_lt.yaml"), Path("configs/arms/ce.yaml"), Path("configs/protocols/no_mixup.yaml")])
        ('cifar10_lt', 'ce_no_mixup')
        >>> set_and_arm([Path("mine.yaml")])
        ('mine', None)
    """
    counted = [file for file in files if file.parent.name not in _ADDITIONS]
    start = next((i for i, file in enumerate(counted) if file.parent.name == _ARMS), len(counted))
    before, after = ("_".join(file.stem for file in part) or None for part in (counted[:start], counted[start:]))
    return before, after


def configured(argv: Sequence[str], key: str, kind: type) -> Any:
    """The value of this type that the last configuration file which has one gives for a key, or None."""
    for path in reversed(config_files(argv)):
        if not path.is_file():
            continue  # the parser says so, in its own words
        value: Any = read_yaml(path)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and isinstance(value, kind):
            return value
    return None


def value_of(argv: Sequence[str], key: str) -> str | None:
    """The text that the command line, or else the last configuration file that has one, gives for a key."""
    given = values_of(argv, key)
    text: str | None = given[-1] if given else configured(argv, key, str)
    return text


def after_configs(argv: Sequence[str]) -> int:
    """Where, on the command line, the last configuration file has been named; 1, behind the stage, without any."""
    ends = [i + 2 for i, arg in enumerate(argv) if arg in ("-c", "--config")]
    return max([1, *ends, *(i + 1 for i, arg in enumerate(argv) if arg.startswith("--config="))])
