"""WebDataset tars that maestream did not write, and their expected index."""

import base64
import io
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from PIL import Image

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.index import IndexResult, find_shards, index_shards
from pipeline.errors import UserError
from pipeline.storage.store import open_store

WEBP = base64.b64decode("UklGRiQAAABXRUJQVlA4IBgAAAAwAQCdASoBAAEAAwA0JaQAA3AA/vuUAAA=")  # 1 × 1
Files = dict[str, bytes]


def picture(i: int, kind: str = "JPEG", size: int = 8, **options: object) -> bytes:
    """A picture of `size` + i by `size` pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (size + i, size), (i % 256, 99, 7)).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (size, size), random.Random(seed).randbytes(3 * size * size)).save(buffer, "JPEG")
    return buffer.getvalue()


def pack(path: Path, files: Files, format: int = tarfile.PAX_FORMAT, pax: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), pax or {}
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(keys: list[str], first: int = 0) -> Files:
    return {
        f"{key}.{ext}": picture(i) if ext == "jpg" else str(i % 3).encode()
        for i, key in enumerate(keys, first)
        for ext in ("cls", "jpg")
    }


def index(url: Path | str, to: Path | str | None = None, **options: Any) -> IndexResult:
    store = open_store(str(url))
    return index_shards(
        store, find_shards(store, bool(options.get("skip_damaged"))), open_store(str(to or url)), **options
    )


def refused(url: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        index(url, **options)
    return str(caught.value)


def check(dataset: Dataset) -> dict[str, tuple[bytes, int]]:
    """Image and label of each key, read from the tars as the index says. Asserts that sizes and checksums are correct."""
    located = dataset.locate(np.arange(dataset.samples))
    found = {}
    for i, key in enumerate(dataset.keys(np.arange(dataset.samples))):
        name = dataset.shard_name(int(located.shard[i]))
        data = dataset.shard_store.read_range(name, int(located.offset[i]), int(located.size[i]))
        if data[:4] != b"RIFF":
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (located.width[i], located.height[i])
        assert located.crc32c[i] == (crc32c(data) if dataset.manifest.checksums else 0)
        found[key] = (data, int(located.label[i]))
    assert len(found) == dataset.samples
    return found


def expected(files: Files) -> dict[str, tuple[bytes, int]]:
    return {
        name.removesuffix(".jpg"): (data, int(files[name.removesuffix("jpg") + "cls"]))
        for name, data in files.items()
        if name.endswith(".jpg")
    }
