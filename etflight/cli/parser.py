"""A parser that says in one line what is wrong with a command line, and `--imports`."""

import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser

from etflight.cli import OTHERS, STAGES
from etflight.data import ImageDataModule
from etflight.runs.folder import CONFIG, last_checkpoint
from etflight.utils.errors import UserError, brief, user_error_in
from etflight.utils.jsonargparse_private import in_one_line


class OneLineParser(ArgumentParser):
    """A parser with one-line usage errors, and without abbreviated options.

    Args:
        *args: Positional arguments of `jsonargparse.ArgumentParser`.
        **kwargs: Its keyword arguments.

    Attributes:
        bases: The base class of what an option takes, for each option that takes a class by its name.
    """

    bases: ClassVar[Mapping[str, type]] = {"data": ImageDataModule}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # what is read before parsing (`EarlyOptions`) knows whole names only

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and exit with status 2.

        Raises:
            UserError: A file or a class that was read while parsing has been refused.
            ArgumentError: The option does not fit one of the classes that it may take; the parser of the option catches it.
            SystemExit: With status 2 for anything else.
        """
        if (wrapped := user_error_in(ex)) is not None:
            raise wrapped
        if not self.exit_on_error:
            super().error(message, ex)
        words = (*self.prog.split(), *getattr(self, "args", ()))
        command = " ".join(["etflight", *[word for word in words if word in STAGES | OTHERS][:1]])
        text = in_one_line(message, self.bases) + self._hint(message)
        print(f"etflight: error: {text} (see {command} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _hint(self, message: str) -> str:
        """Say what was meant by a run folder in the place of its files, or by an `--optimizer`, which is `--model.optimizer`."""
        found = re.search(r"unrecognized arguments: (--)?(\S+)", message)
        if found is None:
            return ""
        if not found[1]:
            return hint_for_run(found[2])
        options = {".".join(key.split(".")[:2]) for key, _ in self.get_defaults().items()}
        full = [f"--{option}" for option in sorted(options) if option.partition(".")[2] == found[2].partition("=")[0]]
        return f"; did you mean {' or '.join(full)}?" if full else ""


def hint_for_run(word: str) -> str:
    """Write `; for this run give -c … --ckpt_path …` if a word of a command line is a run folder; empty otherwise."""
    config = Path(word, CONFIG)
    return f"; for this run give -c {config} --ckpt_path {last_checkpoint(Path(word))}" if config.is_file() else ""


def add_imports(parser: ArgumentParser) -> None:
    """Add the argument `--imports`."""
    parser.add_argument(
        "--imports",
        type=str,
        nargs="*",
        default=[],
        help="Modules with heads, losses or data of your own that the checkpoint or its run names.",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import the modules that the user has named.

    Raises:
        UserError: Python does not find a module.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"--imports {name}: {brief(error)}: give a module that Python finds from here") from error
