"""Command lines without torch: a parser for commands that build nothing, and what is read of a command line before it is parsed."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from etflight.utils.errors import UserError
from etflight.utils.yaml import read_yaml


class CommandParser(ArgumentParser):
    """For the commands that build nothing from their options: a parser with usage errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        print(f"etflight: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def without_files(prog: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configuration files that a command line names (`-c`, `--config`), in their order, and the rest of it."""
    parser = CommandParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    known, rest = parser.parse_known_args(argv)
    return known.config, rest


# what decides over a run before its command line can be parsed: where it is, and which checkpoint's model it starts from
_EARLY = (
    "name", "ckpt_path", "trainer.default_root_dir", "data", "data.input_size",
    "model.backbone", "model.head", "model.loss", "model.optimizer", "model.lr_scheduler",
)  # fmt: skip


@dataclass(frozen=True)
class EarlyOptions:
    """Options that have to be known before a command line can be parsed with the checkpoint's model as its defaults.

    Attributes:
        given: what the command line itself gives for them, None where it says nothing.
        files: the configuration files, in their order.
        contents: what these hold.
    """

    given: dict[str, Any]
    files: list[Path]
    contents: list[Any]

    @classmethod
    def of(cls, prog: str, files: Sequence[str], rest: Sequence[str]) -> "EarlyOptions":
        """Read them.

        Args:
            prog: The command, for errors.
            files: its configuration files; one that starts with a brace is the content of a file, and says nothing here.
            rest: the command line without them.

        Raises:
            UserError: a file that is not there, or is no YAML.
            SystemExit: status 2 for an option without a value.
        """
        parser = CommandParser(prog=prog, add_help=False, allow_abbrev=False)
        for key in _EARLY:
            parser.add_argument(f"--{key}", *[f"--{key}.class_path"] * key.startswith("model."), dest=key)
        parser.add_argument("--images", nargs="+")
        given, _ = parser.parse_known_args(rest)
        paths = [Path(file) for file in files if not file.lstrip().startswith("{")]
        return cls(vars(given), paths, [_options_in(path) for path in paths])

    def value(self, key: str, kind: type = str) -> Any:
        """What the command line, or else the last configuration file with a value of this type, gives for an option."""
        if self.given[key] is not None:
            return self.given[key]
        for value in reversed(self.contents):
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None and isinstance(value, kind):
                return value
        return None


def _options_in(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds no options: a configuration file begins with the name of one, such as model: or data:"
        )
    return content


_SETS, _ARMS, _ADDITIONS = "data", "arms", ("trainer", "logger")  # folders of configuration files


def set_and_arm(files: Sequence[Path]) -> tuple[str | None, str | None]:
    """What configuration files stand for, by their names: those before the arm make the set, the arm and those after it the arm.

    Files of a folder `data` make the set wherever they stand. Files of a folder `trainer` or `logger` count as neither.

    Args:
        files: in their order.

    Example:
        >>> set_and_arm([Path("configs/data/cifar10_lt.yaml"), Path("configs/arms/ce.yaml"), Path("configs/protocols/no_mixup.yaml")])
        ('cifar10_lt', 'ce_no_mixup')
        >>> set_and_arm([Path("configs/arms/ce.yaml"), Path("configs/data/digits.yaml")])
        ('digits', 'ce')
        >>> set_and_arm([Path("mine.yaml")])
        ('mine', None)
    """
    counted = [file for file in files if file.parent.name not in _ADDITIONS]
    counted.sort(key=lambda file: file.parent.name != _SETS)
    start = next((i for i, file in enumerate(counted) if file.parent.name == _ARMS), len(counted))
    before, after = ("_".join(file.stem for file in part) or None for part in (counted[:start], counted[start:]))
    return before, after
