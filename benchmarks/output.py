"""Where benchmarks write their results."""

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save_result(name: str, result: dict[str, Any], markdown: str | None = None) -> str:
    """Write benchmarks/results/NAME.json and, if there is any text, NAME.md. Returns a message with their paths."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if markdown is not None:
        (RESULTS / f"{name}.md").write_text(markdown)
    path = os.path.relpath(RESULTS / name)
    return f"results → {path}.json" + (f" and {path}.md" if markdown is not None else "")
