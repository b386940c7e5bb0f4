"""What commands that look at images share: `--data …` and `-c CONFIG` as `fit` takes them, one-line errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]

import etflight.data
from etflight.cli.argv import config_files, positional, values_of
from etflight.cli.parser import OneLineParser
from etflight.data import ImageDataModule
from etflight.runs.folder import run_of
from etflight.utils.errors import UserError
from etflight.utils.yaml import guard_parser, read_yaml, to_yaml


def data_parser(command: str, description: str, *, required: bool = True) -> OneLineParser:
    """A parser with `--data` and `-c`, to which a command adds its own arguments.

    Args:
        command: its name.
        description: what it does, for its help.
        required: whether it cannot do without `--data`.
    """
    guard_parser()
    parser = OneLineParser(prog=f"etflight {command}", description=description)
    parser.add_argument(
        "-c",
        "--config",
        action=ActionConfigFile,
        help="Configuration file of a run; only what it says of the data counts. The command line beats it.",
    )
    parser.add_subclass_arguments(ImageDataModule, "data", required=required, help="The images.")
    return parser


def parse(parser: OneLineParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line.

    Raises:
        UserError: a data set or a file that does not exist.
        SystemExit: status 2 for a usage error, 0 after help.
    """
    OneLineParser.given = [*parser.prog.split()[1:], *argv]
    return parser.parse_args(_with_data_sections(argv))


def parse_over_run(parser: OneLineParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line whose positional argument, if there is one, is a run or a checkpoint of one: its data are the default.

    Raises:
        UserError: as `parse`; nothing has that path, or it tells no data and none are given.
        SystemExit: as `parse`.
    """
    given = positional(argv)
    if given is None:
        return parse(parser, argv)
    run = run_of(Path(given))
    config = run / "config.yaml" if run is not None else None
    if config is not None and config.is_file():
        return parse(parser, ["-c", str(config), *argv])
    if not Path(given).exists():
        raise UserError(f"{given} does not exist: give a run folder, such as runs/digits/ce, or a checkpoint in one")
    if not values_of(argv, "data") and not config_files(argv):
        raise UserError(f"{given} is no run folder with a config.yaml that says its data, nor in one: give --data")
    return parse(parser, argv)


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
    content: Any = read_yaml(path)
    return to_yaml({"data": content["data"]} if isinstance(content, dict) and "data" in content else {})


# data sets are found by name because they are imported here
_ = etflight.data
