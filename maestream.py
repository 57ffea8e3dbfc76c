"""Entry point of the `maestream` command, and the public Python API: `from maestream import load_encoder`.

The packages `pipeline`, `trainer` and `cluster` have common names. A user's `trainer.py` in a folder of PYTHONPATH would be
imported in place of ours, so this module checks where each package would come from before it imports any of them.
It imports none of them at its top, and its own name is not a common one.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.weights.api import UserError, load_classifier, load_encoder, load_mae, read_model_info

__all__ = ["UserError", "load_classifier", "load_encoder", "load_mae", "read_model_info"]

ROOT = Path(__file__).resolve().parent
PACKAGES = ("pipeline", "trainer", "cluster")


def hiding_module() -> tuple[str, Path] | None:
    """Return the first of our packages that another module hides, with that module's file; None if none is hidden.

    A folder of that name without `__init__.py` hides nothing: Python prefers a package from anywhere on its path.
    """
    for name in PACKAGES:
        spec = find_spec(name)
        if spec and spec.origin and Path(spec.origin).resolve().parent != ROOT / name:
            return name, Path(spec.origin)
    return None


def hiding_message() -> str | None:
    """Return what to do about a module that hides one of our packages; None if there is none."""
    hidden = hiding_module()
    if hidden is None:
        return None
    name, file = hidden
    folder = file.parents[1] if file.name == "__init__.py" else file.parent
    return f"{file} hides maestream's package `{name}`: rename it, or remove {folder} from PYTHONPATH"


def __getattr__(name: str) -> Any:
    """Import a name of the public API when it is first used: the command line does not need torch at once."""
    if name not in __all__:
        raise AttributeError(f"module 'maestream' has no attribute {name!r}")
    if message := hiding_message():
        raise ImportError(message)
    from trainer.weights import api

    return getattr(api, name)


def main() -> None:
    """Run the command line. Exit code 2 if a user's module hides one of our packages."""
    if message := hiding_message():
        print(f"maestream: {message}", file=sys.stderr)
        sys.exit(2)
    from cluster.cli.main import main as run

    run()
