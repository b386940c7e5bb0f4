"""What commands that look at images share: `--data …` and `-c CONFIG` as `fit` takes them, one-line errors, plain text."""

import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

import etflight.data
from etflight.configuration import expand_overlays, guard_parser, read_yaml
from etflight.data import ImageDataModule
from etflight.errors import UserError, user_error_in


class CommandParser(ArgumentParser):
    """With usage errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and exit with status 2."""
        if (wrapped := user_error_in(ex)) is not None:
            raise wrapped
        lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
        text = shorten(" ".join(lines[:2]), 400, placeholder=" …")
        print(f"etflight: error: {text} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def data_parser(command: str, description: str, *, required: bool = True) -> CommandParser:
    """A parser with `--data` and `-c`, to which a command adds its own arguments."""
    guard_parser()
    parser = CommandParser(prog=f"etflight {command}", description=description)
    parser.add_argument(
        "-c",
        "--config",
        action=ActionConfigFile,
        help="Configuration file of a run; only what it says of the data counts. The command line beats it.",
    )
    parser.add_subclass_arguments(ImageDataModule, "data", required=required, help="The images.")
    return parser


def parse(parser: CommandParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line.

    Raises:
        UserError: a data set or a file that does not exist.
        SystemExit: status 2 for a usage error, 0 after help.
    """
    _check_data_name(argv)
    return parser.parse_args(_with_data_sections(expand_overlays(argv)))


def _with_data_sections(argv: Sequence[str]) -> list[str]:
    """Put in the place of each configuration file what it says of the data: the parser knows nothing else."""
    changed: list[str] = []
    for before, arg in zip(["", *argv], argv, strict=False):
        if before in ("-c", "--config"):
            changed[-1] = f"--config={_data_section(Path(arg))}"
        elif arg.startswith("--config="):
            changed.append(f"--config={_data_section(Path(arg.partition('=')[2]))}")
        else:
            changed.append(arg)
    return changed


def _data_section(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}: mend its path")
    content: Any = read_yaml(path)
    return json.dumps({"data": content["data"]} if isinstance(content, dict) and "data" in content else {})


def _check_data_name(argv: Sequence[str]) -> None:
    """Refuse a data set that does not exist before the parser takes its name for that of a file."""
    known: dict[str, type] = {}
    classes = ImageDataModule.__subclasses__()
    while classes:
        cls = classes.pop()
        known[cls.__name__] = cls
        classes += cls.__subclasses__()
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        value = following if flag == "--data" else flag.removeprefix("--data=") if flag.startswith("--data=") else None
        if value is not None and value.isidentifier() and value not in known:
            near = get_close_matches(value, known, n=3) or sorted(known)
            raise UserError(f"no data set is called {value!r}: near matches are {', '.join(near)}")


# data sets are found by name because they are imported here
_ = etflight.data
