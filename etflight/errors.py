"""The one error meant for people."""


class UserError(ValueError):
    """Something the user gave cannot work: one line that says what, where, and the mend.

    The command line prints the message alone and exits with status 1; library callers catch it as a `ValueError`.
    """
