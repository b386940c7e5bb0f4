"""`etflight configs`: lists the configuration files that come with the package, or copies them."""

import shutil
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from etflight.cli.argv import CommandParser
from etflight.runs.folder import check_writable
from etflight.utils.errors import UserError
from etflight.utils.shipped import SHIPPED, shipped_configs

_FOLDERS = {
    "data": "sets with their protocols; one of them comes first",
    "arms": "methods; behind a set",
    "protocols": "changes of a protocol; behind set and arm",
    "trainer": "hardware and precision, for anything",
    "logger": "loggers, for anything",
    "studies": "for etflight study",
    "sweeps": "for wandb sweep",
}


def main(argv: Sequence[str]) -> None:
    """List the files with what they are for, or copy them.

    Args:
        argv: Options.

    Raises:
        UserError: No file has such a name, one to be written exists, or the folder cannot be written to.
    """
    parser = CommandParser(
        prog="etflight configs",
        description="List the configuration files that come with etflight, or copy them.",
        epilog="They need not be copied to be used: etflight fit -c data/digits -c arms/ce",
    )
    parser.add_argument("name", nargs="*", help="only those with this in their path, such as arms or cifar10")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="copy them into this folder, to be changed")
    arguments = parser.parse_args(argv)
    chosen = [path for path in shipped_configs() if all(name in str(path) for name in arguments.name)]
    if not chosen:
        raise UserError(
            f"no configuration file has {' and '.join(arguments.name)} in its path: etflight configs lists them all"
        )
    if arguments.copy is None:
        _list(chosen)
    else:
        _copy(chosen, arguments.copy)


def _list(chosen: Sequence[Path]) -> None:
    width = max(len(path.stem) for path in chosen) + 2
    for folder, paths in groupby(chosen, lambda path: path.parent.name):
        print(f"\n{folder}/: {_FOLDERS[folder]}")
        for path in paths:
            print(f"  {path.stem:<{width}}{textwrap.shorten(_purpose(path), 96, placeholder=' …')}")


def _purpose(path: Path) -> str:
    """The comment that a file begins with."""
    lines = (SHIPPED / path).read_text("utf-8").splitlines()
    comment = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.lstrip("# ") for line in comment)


def _copy(chosen: Sequence[Path], folder: Path) -> None:
    check_writable(folder, "copy")
    there = [path for path in chosen if (folder / path).exists()]
    if there:
        raise UserError(f"{folder / there[0]} exists, and nothing is overwritten: give another folder")
    for path in chosen:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHIPPED / path, folder / path)
    print(f"{len(chosen)} files copied into {folder}")
