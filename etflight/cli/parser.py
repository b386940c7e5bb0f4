"""Usage errors in one line."""

import sys
from collections.abc import Mapping
from typing import ClassVar, NoReturn

from jsonargparse import ArgumentParser

from etflight.cli import OTHERS, STAGES
from etflight.data import ImageDataModule
from etflight.utils.errors import user_error_in
from etflight.utils.jsonargparse_private import in_one_line


class OneLineParser(ArgumentParser):
    """A parser with usage errors of one line.

    Attributes:
        bases: Options that take a class by its name, and what it must be a subclass of.
    """

    bases: ClassVar[Mapping[str, type]] = {"data": ImageDataModule}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line and exit with status 2.

        Raises:
            UserError: A file or a class that was read while parsing has been refused.
            ArgumentError: What is wrong with one of the classes that an option may take; the parser of the option catches it.
            SystemExit: Anything else.
        """
        if (wrapped := user_error_in(ex)) is not None:
            raise wrapped
        if not self.exit_on_error:
            super().error(message, ex)
        words = (*self.prog.split(), *getattr(self, "args", ()))
        command = " ".join(["etflight", *[word for word in words if word in STAGES | OTHERS][:1]])
        print(f"etflight: error: {in_one_line(message, self.bases)} (see {command} --help)", file=sys.stderr)
        raise SystemExit(2)
