"""Paths and URLs in commands and configs. Those of a job must exist for all machines of the cluster."""

from typing import Any

PATH_OPTIONS = ("data", "out", "init", "val", "run", "file", "images")  # command-line options and arguments
PATH_KEYS = ("data.val", "init", "init.run", "knn.val")  # config keys


def paths_in(config: dict[str, Any]) -> dict[str, str]:
    """Return the paths and URLs in a config, by their key in PATH_KEYS.

    Args:
        config: a config as nested dictionaries, as in its YAML file.
    """
    found = {}
    for key in PATH_KEYS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and value != "scratch":
            found[key] = value
    return found
