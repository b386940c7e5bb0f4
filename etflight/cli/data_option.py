"""What the commands that look at images share: `--data …` and `-c CONFIG` as in `fit`, and one-line errors."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]

from etflight.cli.argv import CommandParser, split_config_files, with_named_data
from etflight.cli.parser import OneLineParser, import_modules
from etflight.data import ImageDataModule
from etflight.data.run_options import data_section, refuse_imports
from etflight.runs.folder import CONFIG, run_of
from etflight.utils.errors import UserError
from etflight.utils.yaml import guard_parser, to_yaml


def data_parser(command: str, description: str, *, required: bool = True) -> OneLineParser:
    """A parser with `--data` and `-c`, to which a command adds its own arguments.

    Args:
        command: The command's name.
        description: What the command does, for its help.
        required: Whether `--data` must be given.
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


def parse(parser: OneLineParser, argv: Sequence[str], run: str | None = None) -> Namespace:
    """Parse a command line.

    Args:
        parser: The parser, made by `data_parser`.
        argv: The command line.
        run: A run folder, or a checkpoint in one; its data are the default.

    Raises:
        UserError: A data set, a file, the run or a module of `--imports` does not exist, or the run's data are of a class that has not
            been imported.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    files, words = split_config_files(parser.prog, _without_imports(parser.prog, argv))
    if run is not None:
        folder = run_of(Path(run))
        config = folder / CONFIG if folder is not None else None
        if config is not None and config.is_file() and config not in map(Path, files):
            try:
                refuse_imports(config)
            except UserError as error:
                raise UserError(f"{error} (--imports MODULE), or give -c {config} if you trust that file") from None
            files = [str(config), *files]
        elif (
            existing(run)
            and folder is not None
            and not files
            and not any(w.startswith(("--data", "-h", "--help")) for w in words)
        ):
            raise UserError(
                f"{folder} has no config.yaml that tells the data: give a run folder, such as runs/digits/ce, or --data"
            )
    words = with_named_data(files, words)
    # the parser knows no other section of a configuration file
    return parser.parse_args([*(f"--config={to_yaml(data_section(Path(file)))}" for file in files), *words])


def parse_over_run(parser: OneLineParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line with an optional run: the first word that is neither an option nor the value of one. See `parse`."""
    words = _without_imports(parser.prog, argv)
    pairs = zip(["", *words], words, strict=False)
    run = next((w for before, w in pairs if w[:1] != "-" and (before[:1] != "-" or "=" in before)), None)
    return parse(parser, words, run)


def existing(run: str) -> Path:
    """The path of a run folder or a checkpoint.

    Raises:
        UserError: There is none.
    """
    if not (path := Path(run)).exists():
        raise UserError(f"{run} does not exist: give a run folder, such as runs/digits/ce, or a checkpoint in one")
    return path


def _without_imports(prog: str, argv: Sequence[str]) -> list[str]:
    """Import the modules that `--imports` names, since the other words, which are returned, may need them."""
    parser = CommandParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--imports", action="extend", nargs="*", default=[])
    known, rest = parser.parse_known_args(argv)
    import_modules(known.imports)
    return rest
