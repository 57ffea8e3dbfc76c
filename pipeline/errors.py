"""The one exception for what only a person can mend."""


class UserError(Exception):
    """Something only a person can mend: its text says what was wrong, where, and what to do.

    The command line prints the text alone, without a traceback, and exits with code 2.
    """
