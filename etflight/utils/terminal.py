"""Output for a terminal, or for a file in its place: its width, and text that cannot control it."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes time, which `--version` need not wait for
    from rich.console import Console
    from rich.text import Text

_WIDEST = 200  # wide enough that no cell of our tables is cut or wrapped


def console() -> "Console":
    """Return the console on which a command prints tables.

    It is as wide as the terminal or as COLUMNS says; otherwise, for instance into a file, it is as wide as the tables need.
    """
    from rich.console import Console

    found = Console()
    return found if found.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=_WIDEST)


def plain(value: object) -> str:
    r"""Write a value as text without characters that would control a terminal or end a line.

    Example:
        >>> plain("\x1b[31mred\nand more")
        ' [31mred and more'
    """
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def readable(name: object) -> str:
    r"""Make the name of a file or of a class a text that can be encoded: bytes are read as UTF-8, and those that are none are written out.

    Example:
        >>> readable("caf\udce9")
        'caf\\udce9'
    """
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
    return text.encode("utf-8", "backslashreplace").decode()


def as_it_is(value: object) -> "Text":
    """Make `plain` text for `console`, in which nothing is interpreted as markup."""
    from rich.text import Text

    return Text(plain(value))
