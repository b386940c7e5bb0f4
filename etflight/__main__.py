"""`etflight …` and `python -m etflight …`: errors become one line."""

import os
import select
import signal
import sys
import warnings
from importlib import import_module
from io import TextIOWrapper

from etflight import __version__
from etflight.cli import OTHERS, STAGES
from etflight.utils.errors import options_for_arguments, print_error
from etflight.utils.memory import keep_freed_memory

_COMMANDS = STAGES | OTHERS


@options_for_arguments()
def run() -> int:
    """Run the command line of this process.

    Returns:
        The exit status: 0; 1 when something the user gave cannot work; 2 when there is no such command; 130 after Ctrl+C; 141 when nobody
        reads the output any more. (The parsers exit with 2 on other usage errors.)
    """
    argv = sys.argv[1:]
    command = argv[0] if argv else ""
    if argv == ["--version"]:
        print(f"etflight {__version__}")
        return 0
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command not in _COMMANDS:
        given = f"there is no command {command!r}" if command and command[0] != "-" else "the command comes first"
        print(f"etflight: error: {given}: give one of these\n\n{_overview()}", file=sys.stderr)
        return 2
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)  # they are for the authors of code that is not the user's
    # for a user's own head or data set in the current folder; last, so that no file there takes the place of a package
    sys.path.append(os.getcwd())
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a file name need not be text
    try:
        keep_freed_memory()
        # imported only when asked for
        if command in OTHERS:
            import_module(f"etflight.cli.{command}").main(argv[1:])
        else:
            import_module("etflight.cli.stages").main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 128 + signal.SIGPIPE  # as of any program that runs into `| head`
        if os.environ.get("ETFLIGHT_DEBUG") == "1":
            raise
        print_error(error)
        return 1
    return 0


def _reader_has_left() -> bool:
    """Whether nobody reads the standard output any more; if so, what is left of it goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLERR)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _overview() -> str:
    rows = "\n".join(f"  {name:<12}{what}" for name, what in _COMMANDS.items())
    return (
        "usage: etflight COMMAND ...\n\nImage classifiers with a fixed simplex-ETF head.\n\n"
        f"{rows}\n\netflight COMMAND --help says what a command takes, etflight --version which release this is."
    )


if __name__ == "__main__":
    sys.exit(run())
