"""The one error meant for people, and warnings for them."""

import sys

from etflight.utils.terminal import plain


class UserError(ValueError):
    """Something the user gave cannot work: one line that says what, where, and the mend.

    The command line prints the message alone and exits with status 1; library callers catch it as a `ValueError`.
    """


def user_error_in(error: BaseException | None) -> UserError | None:
    """The `UserError` at the bottom of what a parser or a data worker wrapped, or None."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def warn(text: str) -> None:
    """Print a line that begins as the command line's own warnings do, each time, from whichever process it is called in."""
    print(f"etflight: warning: {plain(text)}", file=sys.stderr, flush=True)
