"""Small pictures, folders of them, and Parquet files with them, as people have them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int = 0, format: str = "JPEG") -> bytes:
    """An image of 8 × 8 pixels, another one for each number."""
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(data, format)
    return data.getvalue()


def tree(folder: Path, *names: str) -> Path:
    """A folder of these files, each a different picture."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "PNG" if path.suffix.lower() == ".png" else "JPEG"))
    return folder


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet_file(path: Path, features: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A Parquet file with these columns. Without `image`, that column has a picture in each row."""
    count = len(next(iter(columns.values())))
    if "image" not in columns:
        images = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(count)]
        columns = {"image": pa.array(images, IMAGE_TYPE), **columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path
