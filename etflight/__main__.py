"""`etflight …` and `python -m etflight …`: errors become one line."""

import os
import re
import sys
from importlib import import_module
from textwrap import shorten

from etflight._version import __version__
from etflight.errors import user_error_in

# what is not a stage of the Trainer: etflight/commands/<name>.py, imported only when asked for
COMMANDS = ("report", "collapse")


def run() -> int:
    """Run the command line of this process.

    Returns:
        The exit status: 0, or 1 when something the user gave cannot work (usage errors exit with 2 by themselves).
    """
    if sys.argv[1:] == ["--version"]:
        print(f"etflight {__version__}")
        return 0
    # a user's own head or data set in a module of the current folder; last, so that no file there takes the place of a package
    sys.path.append(os.getcwd())
    try:
        if sys.argv[1:2] and sys.argv[1] in COMMANDS:
            import_module(f"etflight.commands.{sys.argv[1]}").main(sys.argv[2:])
        else:
            import_module("etflight.cli").main()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("ETFLIGHT_DEBUG") == "1":
            raise
        print(f"etflight: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: BaseException) -> str:
    """What went wrong, in one line, wherever it was wrapped: by the parser, or with a traceback by a data worker."""
    wrapped = user_error_in(error)
    if wrapped is not None:
        return _message(wrapped)
    return f"{type(error).__name__}: {_message(error)} (ETFLIGHT_DEBUG=1 shows where)"


def _message(error: BaseException) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # a worker's exception carries its traceback as text
        text = re.sub(r"^[\w.]*(Error|Exception): ", "", text.splitlines()[-1])
    # what a file says may be part of the message, but commands no terminal
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return shorten(text, 1500, placeholder=" …")


if __name__ == "__main__":
    sys.exit(run())
