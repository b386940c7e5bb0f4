"""What goes to a terminal, or into the file that stands in for one: its width, and text that cannot command it."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich, which `--version` need not wait for
    from rich.console import Console
    from rich.text import Text

_WIDEST = 200  # of what we print: enough that no cell of a table is cut or wrapped


def console() -> "Console":
    """Where a command prints tables: as wide as the terminal, or as COLUMNS says; else, as into a file, as wide as they need."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=_WIDEST)


def plain(value: object) -> str:
    r"""A value as text without what would command a terminal, or end a line.

    Example:
        >>> plain("\x1b[31mred\nand more")
        ' [31mred and more'
    """
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def readable(name: str) -> str:
    r"""The name of a file, or one of a class that was taken from it, as text that can be encoded: bytes that are no UTF-8 written out.

    Example:
        >>> readable("caf\udce9")
        'caf\\udce9'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def as_it_is(value: object) -> "Text":
    """`plain` text for `console`, in which nothing is taken for markup."""
    from rich.text import Text

    return Text(plain(value))
