"""A damaged file ends as the right images, as bad samples that are counted and named, or as one clear message:
never as a crash, a hang or a wrong image."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.build.synthetic import draw_scene
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.manifest import INDEX_SCHEMA, MANIFEST, index_name
from pipeline.decode.decoder import DecoderName
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.images.formats import image_info
from pipeline.loading.crops import centre_crops
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order
from pipeline.loading.readahead import read_samples
from pipeline.storage.parquet import to_parquet
from tests.support.datasets import build_dataset

pytestmark = pytest.mark.integration

CACHE_BYTES = 64 << 20
HANG_S = 60
DECODERS: list[DecoderName] = ["cpu", "dali"] if importlib.util.find_spec("nvidia") else ["cpu"]
Pixels = tuple[float, torch.Tensor, int]  # weight, image, label
Draw = Callable[[st.SearchStrategy[Any]], Any]
log = logging.getLogger("maestream")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 scenes of about 64 pixels in several shards: quick to copy and to decode."""
    folder = tmp_path_factory.mktemp("small")
    for i in range(24):
        path = folder / f"images/{i % 3}/{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(draw_scene(0, i, i % 3))) as image:
            image.reduce(7).save(path, quality=90)
    dataset = build_dataset(str(folder / "images"), str(folder / "dataset"), shard_bytes=10_000)
    assert len(dataset.shard_samples) > 2
    assert (dataset.shard_samples > 1).all()  # there is something to swap
    return dataset


def read_epoch(folder: Path, decoder: DecoderName, cache: Path | None = None) -> dict[int, Pixels]:
    """What training gets of each sample in an epoch."""
    dataset = open_dataset(str(folder))
    order = Order(dataset.shard_samples, seed=0, global_batch=6, lanes=3, block=4)
    loader = Loader(
        dataset, order, make_decoder(decoder, 32, 2), 0, 1, (str(cache), CACHE_BYTES) if cache else None
    )
    seen = {}
    with contextlib.closing(loader):
        for batch in loader.steps(0, order.steps_per_epoch):
            parts = (batch.weights.tolist(), batch.images, batch.labels.tolist())
            seen |= dict(zip(batch.sample_ids.tolist(), zip(*parts, strict=True), strict=True))
    return seen


class Names(logging.Handler):
    """Ids of the samples that are named as bad."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().replace(",", "").split()
        if words[:2] == ["bad", "sample"]:
            self.ids.add(int(words[2]))


@contextlib.contextmanager
def bad_samples() -> Iterator[set[int]]:
    handler = Names()
    log.addHandler(handler)
    try:
        yield handler.ids
    finally:
        log.removeHandler(handler)


def flip(draw: Draw, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    replace(path, data)


def truncate(draw: Draw, path: Path) -> None:
    data = path.read_bytes()
    replace(path, data[: draw(st.integers(0, len(data) - 1))])


def swap_members(draw: Draw, path: Path) -> None:
    """Two images change places, so that each has the other's key; what is behind moves if their sizes differ."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    images = [i for i, (member, _) in enumerate(members) if member.name.endswith(".jpg")]
    a, b = draw(st.lists(st.sampled_from(images), min_size=2, max_size=2, unique=True))
    swapped = {a: members[b][1], b: members[a][1]}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (member, data) in enumerate(members):
            data = swapped.get(i, data)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    replace(path, buffer.getvalue())


def replace(path: Path, data: bytes | bytearray) -> None:
    path.unlink()  # the copy is of links
    path.write_bytes(data)


def swap_files(draw: Draw, path: Path) -> Path:
    """With another of its folder and kind. Returns that one."""
    others = [other for other in sorted(path.parent.glob(f"*{path.suffix}")) if other != path]
    other: Path = draw(st.sampled_from(others))
    path.rename(aside := path.with_name("aside"))
    other.rename(path)
    aside.rename(other)
    return other


def do_damage(draw: Draw, root: Path) -> list[str]:
    """One damage to a file of a dataset. Returns the names of what was damaged."""
    path: Path = draw(st.sampled_from(sorted(p for p in root.rglob("*") if p.is_file())))
    kinds = ["flip", "flip", "truncate"]
    if path.suffix == ".tar":
        kinds += ["swap members", "swap files"]
    if path.parent.name == "index":
        kinds += ["swap files"]
    kind = draw(st.sampled_from(kinds))
    if kind == "swap files":
        return [path.name, swap_files(draw, path).name]
    {"flip": flip, "truncate": truncate, "swap members": swap_members}[kind](draw, path)
    return [path.name]


def copy(source: str, dest: Path) -> Path:
    shutil.copytree(source, dest, copy_function=os.link)
    return dest


def assert_harmless(
    read: Callable[[], dict[int, Pixels]], right: dict[int, Pixels], damaged: list[str]
) -> str:
    """Reads what is damaged. Returns how it ended."""
    begin = time.monotonic()
    seen, stopped = {}, ""
    with bad_samples() as named:
        try:
            seen = read()
        except UserError as error:
            stopped = str(error)
    assert time.monotonic() - begin < HANG_S
    if stopped:
        assert any(name in stopped for name in damaged), stopped
        return "stopped"
    assert seen.keys() == right.keys()
    bad = {i for i, (weight, _, _) in seen.items() if weight == 0}
    assert bad == named
    for i, (_, image, label) in seen.items():
        assert torch.equal(image, torch.zeros_like(image) if i in bad else right[i][1]), i
        assert i in bad or label == right[i][2], i
    return "bad samples" if bad else "right"


def damage_and_read(dataset: Dataset, decoder: DecoderName, examples: int) -> None:
    """Each example does one damage to a copy of the dataset and reads an epoch of it."""
    right = read_epoch(Path(dataset.store.root), decoder)
    assert all(weight == 1 for weight, _, _ in right.values())
    ends: dict[str, int] = {}

    @settings(max_examples=examples, database=None, derandomize=examples < 100)
    @given(st.data())
    def example(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(dir=Path(dataset.store.root).parent) as folder:
            root = copy(dataset.store.root, Path(folder, "copy"))
            damaged = do_damage(data.draw, root)
            end = assert_harmless(lambda: read_epoch(root, decoder), right, damaged)
            ends[end] = ends.get(end, 0) + 1

    example()
    assert examples < 20 or ends.keys() == {"right", "bad samples", "stopped"}, ends


def test_damage_is_right_or_bad_or_a_stop(small: Dataset) -> None:
    damage_and_read(small, "cpu", 25)


def test_damage_is_the_same_to_dali(small: Dataset) -> None:
    pytest.importorskip("nvidia.dali")
    damage_and_read(small, "dali", 8)


def damage_images(dataset: Dataset, name: DecoderName, examples: int) -> None:
    """Where there are no checksums, damaged bytes reach the decoder: the others of the batch do not feel it."""
    samples = read_samples(dataset, np.arange(8))
    boxes = centre_crops(samples.located.height, samples.located.width)
    flips = np.zeros(8, bool)
    with contextlib.closing(make_decoder(name, 32, 2)) as decoder:
        right = decoder(samples.encoded, boxes, flips)
        assert right.bad == {}

        @settings(max_examples=examples, database=None, derandomize=examples < 100)
        @given(st.integers(0, 7), st.data())
        def example(victim: int, data: st.DataObject) -> None:
            image = bytearray(samples.encoded[victim])
            # Half of them among the first bytes: the headers, where a byte means much.
            last = data.draw(st.sampled_from([700, len(image)])) - 1
            for place in data.draw(st.lists(st.integers(0, last), max_size=4)):
                image[place] ^= data.draw(st.integers(1, 255))
            image = image[: data.draw(st.sampled_from([len(image), data.draw(st.integers(0, last))]))]
            encoded = [*samples.encoded]
            encoded[victim] = bytes(image)
            decoded = decoder(encoded, boxes, flips)
            assert decoded.bad.keys() <= {victim}
            others = torch.arange(8) != victim
            assert torch.equal(decoded.images[others], right.images[others])
            assert victim not in decoded.bad or not decoded.images[victim].any()

        example()


@pytest.mark.parametrize("decoder", DECODERS)
def test_damaged_images_do_not_touch_their_neighbours(small: Dataset, decoder: DecoderName) -> None:
    damage_images(small, decoder, 60)


def damage_kept_part(dataset: Dataset, folder: Path, examples: int) -> None:
    """The disk cache is only a copy: however it is damaged, the images are right."""
    right = read_epoch(Path(dataset.store.root), "cpu", folder)
    assert len(list(folder.rglob("0*/0*"))) == len(dataset.shard_names)

    @settings(max_examples=examples, database=None, derandomize=examples < 100)
    @given(st.data())
    def example(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as kept:
            root = copy(str(folder), Path(kept, "copy"))
            path = data.draw(st.sampled_from(sorted(root.rglob("0*/0*"))))
            data.draw(st.sampled_from([flip, truncate]))(data.draw, path)
            end = assert_harmless(lambda: read_epoch(Path(dataset.store.root), "cpu", root), right, [])
            assert end == "right"

    example()


def test_damage_to_the_kept_part_changes_nothing(small: Dataset, tmp_path: Path) -> None:
    damage_kept_part(small, tmp_path / "kept", 6)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", -1),
        ("offset", 2**62),
        ("offset", 2**63 - 1),
        ("size", 0),
        ("size", -7),
        ("size", 2**31 - 1),
        ("width", 0),
        ("height", -(2**31)),
    ],
)
def test_absurd_numbers_in_an_index_are_refused(
    small: Dataset, tmp_path: Path, column: str, value: int
) -> None:
    root = copy(small.store.root, tmp_path / "copy")
    rows = small.read_index_table(1).to_pylist()
    rows[2][column] = value
    path = root / index_name(small.shard_name(1))
    replace(path, to_parquet(pa.Table.from_pylist(rows, INDEX_SCHEMA)))
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        read_epoch(root, "cpu")


def test_an_image_without_area_is_not_indexed() -> None:
    for width, height in ((0, 5), (5, 0)):
        numbers = width.to_bytes(2, "little") + height.to_bytes(2, "little")
        webp = b"RIFF\0\0\0\0WEBPVP8 " + bytes(7) + b"\x9d\x01\x2a" + numbers
        with pytest.raises(ValueError, match=f"the image has {width} × {height} pixels"):
            image_info(lambda at, n, webp=webp: webp[at : at + n], len(webp))


def test_a_size_that_is_not_the_images_is_a_bad_sample(small: Dataset, tmp_path: Path) -> None:
    root = copy(small.store.root, tmp_path / "copy")
    rows = small.read_index_table(0).to_pylist()
    rows[1] |= {"width": 500, "height": 3}
    rows[2] |= {"width": 2**31 - 1, "height": 2**31 - 1}
    replace(root / index_name(small.shard_name(0)), to_parquet(pa.Table.from_pylist(rows, INDEX_SCHEMA)))
    for decoder in DECODERS:
        seen = read_epoch(root, decoder)
        assert sorted(i for i in seen if seen[i][0] == 0) == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -24},
        {"samples": 10**30},
        {"samples": None},
        {"shards": 2.5},
        {"image_bytes": -1},
        {"image_bytes": 10**18},
        {"classes": "many"},
        {"fingerprint": "0" * 64},
        {"format_version": -1},
        {"format_version": [1]},
        {"format_version": 3},
    ],
    ids=str,
)
def test_absurd_values_in_the_manifest_are_refused(
    small: Dataset, tmp_path: Path, change: dict[str, object]
) -> None:
    path = copy(small.store.root, tmp_path / "copy") / MANIFEST
    replace(path, json.dumps(json.loads(path.read_bytes()) | change).encode())
    with pytest.raises(UserError, match=re.escape(MANIFEST)):
        open_dataset(str(path.parent))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"[" * 100_000, b'{"format_version": 1' + b"0" * 5000])
def test_what_is_no_manifest_is_refused(small: Dataset, tmp_path: Path, text: bytes) -> None:
    path = copy(small.store.root, tmp_path / "copy") / MANIFEST
    replace(path, text)
    with pytest.raises(UserError, match=re.escape(MANIFEST)):
        open_dataset(str(path.parent))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("decoder", DECODERS)
def test_200_damages(small: Dataset, tmp_path: Path, decoder: DecoderName) -> None:
    damage_and_read(small, decoder, 200)
    damage_kept_part(small, tmp_path / "kept", 50)
    damage_images(small, decoder, 1000)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_damages_to_photographs(photographs: Dataset, tmp_path: Path) -> None:
    damage_and_read(photographs, "cpu", 50)
