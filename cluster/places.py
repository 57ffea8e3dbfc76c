"""Folders, files and URLs that a run works with, and which of them other machines may lack."""

from typing import Any

OPTIONS = ("data", "out", "init", "val", "run", "file", "images")  # and arguments
KEYS = ("data.val", "init", "init.run", "knn.val")  # of configs


def places_in(config: dict[str, Any]) -> dict[str, str]:
    """What a config, as a tree, says of KEYS."""
    found = {}
    for key in KEYS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and value != "scratch":
            found[key] = value
    return found
