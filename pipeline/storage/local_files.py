"""Files of local folders: what fsspec does not do, or not in the way that we need."""

import os
from collections.abc import Iterator

from pipeline.errors import UserError


def file_size(path: str) -> int:
    """Size of a local file in bytes. UserError for a broken symbolic link."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(
            f"{path} is a broken symbolic link, or was just removed: remove the link, or run the command again"
        ) from None


def walk(folder: str) -> Iterator[str]:
    """Paths of all files below a local folder. OSError if a folder cannot be read or does not exist."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not _is_loop(folder, root, name)]
        yield from (os.path.join(root, name) for name in files)


def _is_loop(top: str, folder: str, name: str) -> bool:
    """Whether `name` is a link to a folder that contains it, on the way from `top` to `folder`: it would never end."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    target = os.path.join(os.path.realpath(path), "")
    while not os.path.join(os.path.realpath(folder), "").startswith(target):
        if folder == top:
            return False
        folder = os.path.dirname(folder)  # after a link, this is not in the real path
    return True
