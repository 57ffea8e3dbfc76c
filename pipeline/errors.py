"""The one exception for what only a person can mend."""


class UserError(Exception):
    """Something only a person can mend: its text says what was wrong, where, and what to do.

    The command line prints the text alone, without a traceback, and exits with code 2.
    """


def why_undecodable(error: Exception) -> str:
    """What Pillow's exception says about an image, without addresses."""
    text = str(error) or type(error).__name__
    return "not an image" if "cannot identify image file" in text else text
