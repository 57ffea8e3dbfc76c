"""JSON lines in a run folder: one JSON object a line, and nothing else.

A writer can be killed at any byte, so a file may end within a line. `repair_lines` removes such a part before more is
appended; readers skip it.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.storage.store import TEMPORARY, Store

BLOCK = 1 << 20  # bytes to read at once, from the end of a file


def to_line(value: dict[str, Any]) -> bytes:
    """One object as a line. Keys whose value is NaN or infinite, which JSON does not have, are left out."""
    return json.dumps(_finite(value), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    """The value without dictionary entries that are not finite. In lists, these become None, so that places stay."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items() if not _is_not_finite(item)}
    if isinstance(value, list | tuple):
        return [None if _is_not_finite(item) else _finite(item) for item in value]
    return value


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def append_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Append objects to a local file. If an earlier write was cut off, what is left of its last line is removed."""
    lines = b"".join(map(to_line, values))
    if not lines:
        return
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            repair_lines(path)
    with path.open("ab") as file:
        file.write(lines)


def repair_lines(path: Path) -> None:
    """Remove all lines of a local file that are not one JSON object, if there are any. Whole lines stay as they are.

    Such lines come from a writer that was killed, or from older versions, which only ended such a line.
    """
    if not path.exists() or _is_whole_file(path):
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=".tmp")
    with path.open("rb") as file, open(handle, "wb") as repaired:
        for line in file:
            if _parse(line) is not None:
                repaired.write(line.rstrip(b"\n") + b"\n")  # the last one may lack its end
        repaired.flush()
        os.fsync(repaired.fileno())
    os.chmod(temporary, path.stat().st_mode)
    os.replace(temporary, path)


def newest_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a local file, the last one first, without reading more of the file than is asked for."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end:
            start = max(end - BLOCK, 0)
            rest, *lines = (os.pread(file.fileno(), end - start, start) + rest).split(b"\n")
            yield from filter(None, map(_parse, reversed(lines)))
            end = start
        yield from filter(None, [_parse(rest)])


def _is_whole_file(path: Path) -> bool:
    """Whether all lines are whole. Fast, because a run of a million steps reads all of them at each start of its workers."""
    with path.open("rb") as file:
        return all(_is_whole(line) for line in file)


def _is_whole(line: bytes) -> bool:
    """Whether a line is an object and ends. Without strings as values, its brackets say so."""
    if b': "' in line or b'["' in line or b"}{" in line:
        return line[-1:] == b"\n" and _parse(line) is not None
    return line[:1] == b"{" and line[-2:] == b"}\n" and line.count(b"{") == line.count(b"}")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None if the line is not one object."""
    try:
        value = json.loads(line)
    except ValueError:  # also for bytes that are not UTF-8
        return None
    return value if isinstance(value, dict) else None


def read_lines(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file. Incomplete lines, left by killed processes, are skipped."""
    for line in store.read(name).split(b"\n"):
        if (value := _parse(line)) is not None:
            yield value
