"""Command lines without torch: the parser of commands that build nothing, and the options that are read before parsing."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from etflight.utils.errors import UserError
from etflight.utils.shipped import find_config
from etflight.utils.yaml import read_yaml


class CommandParser(ArgumentParser):
    """A parser with one-line usage errors, for the commands that build nothing from their options."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        print(f"etflight: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def split_config_files(prog: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configuration files that a command line names (`-c`, `--config`), in their order, and its other words.

    A name without such a file stands for the shipped file of that name; the content of a file (in braces) stays as it is.
    """
    parser = CommandParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    known, rest = parser.parse_known_args(argv)
    return [file if file.lstrip().startswith("{") else str(find_config(file)) for file in known.config], rest


def with_named_data(files: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words of a command line, with FolderImages for the data where they give `--data.root` and nothing says of which set.

    Args:
        files: The command's configuration files.
        words: The command line without these files.
    """
    names = {word.partition("=")[0] for word in words}
    says = {"--data", "--data.class_path", "--images"} & names or any(
        file.lstrip().startswith("{") or _at("data", read_yaml(Path(file))) is not None for file in files
    )
    return list(words) if says or "--data.root" not in names else ["--data=FolderImages", *words]


FINE_TUNING = (
    "weights",
    "freeze",
    "unfreeze_epoch",
    "freeze_statistics",
)  # its options that a file gives for one of two stages
# options that are needed before a command line can be parsed: they tell where the run is, and which checkpoint's model it starts from
_EARLY = (
    "name", "ckpt_path", "trainer", "trainer.default_root_dir", "data", "data.input_size",
    "model", "model.backbone", "model.head", "model.loss", "model.optimizer", "model.lr_scheduler",
    *(f"fine_tuning.{name}" for name in FINE_TUNING),
)  # fmt: skip


@dataclass(frozen=True)
class EarlyOptions:
    """Options that have to be known before a command line can be parsed with the checkpoint's model as its defaults.

    Attributes:
        given: The values on the command line itself, by option; None where it has none.
        files: The configuration files, in their order.
        contents: The contents of these files.
    """

    given: dict[str, Any]
    files: list[Path]
    contents: list[Any]

    @classmethod
    def of(cls, prog: str, files: Sequence[str], rest: Sequence[str]) -> "EarlyOptions":
        """Read the options.

        Args:
            prog: The command, for errors.
            files: The command's configuration files; one that starts with a brace is the content of a file, and is skipped.
            rest: The command line without these files.

        Raises:
            UserError: A file does not exist, is no YAML, or is empty; or a section is a file of its own.
            SystemExit: With status 2 for an option without a value.
        """
        parser = CommandParser(prog=prog, add_help=False, allow_abbrev=False)
        for key in _EARLY:
            parser.add_argument(f"--{key}", *[f"--{key}.class_path"] * key.startswith("model."), dest=key)
        parser.add_argument("--images", nargs="+")
        given, _ = parser.parse_known_args(rest)
        paths = [Path(file) for file in files if not file.lstrip().startswith("{")]
        contents = [read_yaml(path) for path in paths]
        if None in contents:
            raise UserError(f"{paths[contents.index(None)]} is empty: give it options, or leave it out")
        for section in ("data", "model", "trainer"):
            values = [
                vars(given)[section],
                *(content.get(section) for content in contents if isinstance(content, dict)),
            ]
            for value in values:
                if isinstance(value, str) and Path(value).suffix in (".yaml", ".yml", ".json"):
                    raise UserError(
                        f"--{section} {value}: a file has all its options below `{section}:`, and is given by -c: -c {value}"
                    )
        return cls(vars(given), paths, contents)

    def value(self, key: str, kind: type = str) -> Any:
        """The value of an option: that of the command line, or else of the last configuration file that has one of this type."""
        found = [self.given[key], *(_at(key, content) for content in reversed(self.contents))]
        return next((value for value in found if isinstance(value, kind) and value is not None), None)

    def class_of(self, key: str) -> str | None:
        """The name of the class that an option takes: that of the command line, or else of the last configuration file that says which."""
        named = (_at(key, content) for content in reversed(self.contents))
        found = [self.given[key], *(_at("class_path", value) if isinstance(value, dict) else value for value in named)]
        return next((value for value in found if isinstance(value, str)), None)


def _at(key: str, content: Any) -> Any:
    """What a configuration has for an option; None if it has nothing."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


_SETS, _ARMS, _ADDITIONS = "data", "arms", ("trainer", "logger")  # folders of configuration files


def set_and_arm(files: Sequence[Path]) -> tuple[str | None, str | None]:
    """The names of a set and an arm, made of the names of configuration files.

    The first file of a folder `arms` and the files after it name the arm; the files before it, and those of a folder `data` wherever they
    stand, name the set. Files of a folder `trainer` or `logger` name neither.

    Args:
        files: The configuration files, in their order.

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
