"""`UserError`: an error that needs the user's action."""


class UserError(Exception):
    """An error that only the user can fix. Its text says what was wrong, where, and what to do.

    The command line prints the text on one line, without a traceback, and exits with code 2.
    """


def why_undecodable(error: Exception) -> str:
    """Return the reason why Pillow could not decode an image, without memory addresses."""
    text = str(error) or type(error).__name__
    return "not an image" if "cannot identify image file" in text else text
