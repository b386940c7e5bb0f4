"""`etflight …` and `python -m etflight …`: errors become one line."""

import os
import sys
from importlib import import_module
from io import TextIOWrapper

from etflight import last_words
from etflight._version import __version__

# what is not a stage of the Trainer: etflight/commands/<name>.py, imported only when asked for
COMMANDS = ("report", "collapse", "describe", "study", "dashboard", "export")


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
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a name of a file need not be text
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
        last_words.say(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
