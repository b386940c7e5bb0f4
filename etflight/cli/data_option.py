"""What the commands that look at images share: `--data …` and `-c CONFIG` as in `fit`, and one-line errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]

from etflight.checkpoint.specs import find_class
from etflight.cli.argv import CommandParser, split_config_files
from etflight.cli.parser import OneLineParser, import_modules
from etflight.data import ImageDataModule
from etflight.runs.folder import run_of
from etflight.utils.errors import UserError
from etflight.utils.limits import refuse_names
from etflight.utils.yaml import guard_parser, read_yaml, to_yaml


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
        config = folder / "config.yaml" if folder is not None else None
        if config is not None and config.is_file() and config not in map(Path, files):
            _refuse_imports(config)
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
    # the parser knows no other section of a configuration file
    return parser.parse_args([*(f"--config={to_yaml(_data_section(Path(file)))}" for file in files), *words])


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


def _data_section(path: Path) -> dict[str, Any]:
    content: Any = read_yaml(path)
    return {"data": content["data"]} if isinstance(content, dict) and "data" in content else {}


def _refuse_imports(config: Path) -> None:
    """Refuse a run's configuration for which code would be imported: the user has named the run, and not this file.

    Raises:
        UserError: Its data are of a class that has not been imported, or an argument of theirs could name code.
    """

    def check(spec: Any) -> None:
        spec = {"class_path": spec} if isinstance(spec, str) else spec
        path, arguments = (
            (spec.get("class_path"), spec.get("init_args") or {}) if isinstance(spec, dict) else (None, {})
        )
        if not isinstance(path, str) or not isinstance(arguments, dict):
            return  # the parser says what is wrong with it
        cls = find_class({"class_path": path if "." in path else f"etflight.data.{path}"}, ImageDataModule)
        if cls is None or spec.keys() - {"class_path", "init_args"}:
            raise UserError(
                f"{config} has data of {path!r}, which has not been imported: import its module (--imports MODULE), or give -c {config} if "
                "you trust that file"
            )
        inner = {name: value for name, value in arguments.items() if isinstance(value, dict) and "class_path" in value}
        refuse_names(cls, {name: value for name, value in arguments.items() if name not in inner}, str(config))
        for value in inner.values():
            check(value)

    for data in _data_section(config).values():
        check(data)
