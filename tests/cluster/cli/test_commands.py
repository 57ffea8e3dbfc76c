"""The command line: commands do what they say, and invalid input gives one clear line and exit code 2."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.build.synthetic import draw_scene
from pipeline.dataset.dataset import Dataset
from tests.support.command_line import maestream, printed, refused
from tests.support.processes import processes

pytestmark = pytest.mark.integration

TINY = "recipes/pretrain_vit_tiny.yaml"


def test_build_show_and_verify(tmp_path: Path) -> None:
    for i in range(4):
        folder = tmp_path / "src" / ("ab"[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(draw_scene(0, i, 0))
    (tmp_path / "src" / "a" / "torn.jpg").write_bytes(draw_scene(0, 9, 0)[:9000])
    (tmp_path / "src" / "a" / "notes.txt").write_text("mine")
    out = maestream("shards", "build", tmp_path / "src", tmp_path / "out").stdout
    assert "note: ignored 1 other file: 1 .txt" in out
    assert "skipped a/torn.jpg: image file is truncated" in out
    assert "4 images in 1 shard," in out
    assert "1 skipped" in out
    out = printed("shards", "show", tmp_path / "out", "--grid", tmp_path / "g.png")
    assert "2: a, b" in out
    with Image.open(tmp_path / "g.png") as sheet:
        assert sheet.width > 400
    assert "4 images in 1 shard verified, all intact" in printed("shards", "verify", tmp_path / "out")
    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8", b"\xff\xd9", 1))
    done = maestream("shards", "verify", tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "shard-000000.tar: a/" in done.stdout or "shard-000000.tar: b/" in done.stdout


def test_index_of_foreign_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in {"a.jpg": draw_scene(0, 0, 0), "a.cls": b"cat", "b.jpg": b"torn"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert "b.jpg: not an image: expected JPEG, PNG" in refused("shards", "index", tmp_path)
    out = printed("shards", "index", tmp_path, "--skip-damaged", "--to", tmp_path / "elsewhere")
    assert "skipped x.tar: b at byte" in out
    assert "indexed 1 image in 1 shard," in out
    assert "corrupted bytes are only detected if an image no longer decodes" in out
    out = printed("shards", "show", tmp_path / "elsewhere")
    assert "1: cat" in out
    assert "indexed " in out
    assert "the dataset has no checksums" in printed("shards", "verify", tmp_path / "elsewhere")


def test_a_killed_build_is_not_a_dataset_and_can_be_overwritten(tmp_path: Path) -> None:
    words = ["shards", "build", "synthetic:?count=300", str(tmp_path / "out"), "--shard-mb", "1"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("maestream"), *words], stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "out" / "shard-000001.tar").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert "unfinished build" in refused("shards", "show", tmp_path / "out")
    other = (*words[:2], "synthetic:?count=20", *words[3:])
    assert "an unfinished build from another source" in refused(*other)
    printed(*other, "--overwrite")
    assert "20 images in 1 shard verified, all intact" in printed("shards", "verify", tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".maestream")]


def test_order_prints_json_lines_that_agree_at_every_world_size(scenes: Dataset) -> None:
    def lines(*words: object) -> list[dict]:
        out = printed("order", scenes.store.url, "--global-batch", 12, *words)
        return [json.loads(line) for line in out.splitlines()]

    all_steps = lines("--seed", 3, "--epoch", 2)
    assert [line["step"] for line in all_steps] == list(range(5))
    parts = [
        lines("--seed", 3, "--epoch", 2, "--world-size", 2, "--rank", r, "--steps", "1:3") for r in (0, 1)
    ]
    for line, a, b in zip(all_steps[1:3], *parts, strict=True):
        assert a["step"] == b["step"] == line["step"]
        assert sorted(a["sample_ids"] + b["sample_ids"]) == sorted(line["sample_ids"])
    line = all_steps[0]
    assert len(line["keys"]) == len(line["crops"]) == len(line["flips"]) == 12
    assert all(len(crop) == 4 for crop in line["crops"])
    assert lines("--lanes", 2, "--block", 5) != lines()


def test_invalid_sources_and_destinations_are_refused(scenes: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.jpg").write_bytes(draw_scene(0, 0, 0)[:7000])
    (tmp_path / "torn" / "b.jpg").write_bytes(draw_scene(0, 1, 0))

    def build(*words: object) -> str:
        return refused("shards", "build", *words)

    assert "no such file or folder" in build(tmp_path / "missing", tmp_path / "out")
    assert "no images in it" in build(tmp_path / "empty", tmp_path / "out")
    assert "already has a dataset" in build("synthetic:?count=1", scenes.store.url)
    assert "a.jpg cannot be read" in build(tmp_path / "torn", tmp_path / "out", "--strict")
    assert "gs://" in build("gs://bucket/x", tmp_path / "o")
    (tmp_path / "file").write_text("x")
    assert "is a file" in build("synthetic:?count=1", tmp_path / "file")
    assert "is a file" in build("synthetic:?count=1", tmp_path / "file" / "below")
    assert "is a file" in build(tmp_path / "file", tmp_path / "other")
    printed("shards", "build", tmp_path / "torn", tmp_path / "out")  # without --strict it is built


def test_unsuitable_datasets_are_refused(scenes: Dataset, tmp_path: Path) -> None:
    def pretrain(data: object, *words: object) -> str:
        return refused("pretrain", "--config", TINY, "--data", data, "--out", tmp_path / "run", *words)

    assert "not a dataset" in pretrain(tmp_path)
    assert "run `maestream shards build`" in pretrain(tmp_path)
    assert "fewer than one global batch of 71" in pretrain(scenes.store.url, "global_batch=71")
    assert "not divisible by the lanes" in pretrain(scenes.store.url, "data.lanes=7")
    assert "use at most 16 workers" in pretrain(scenes.store.url, "workers=17")
    assert "did you mean epochs?" in pretrain(scenes.store.url, "epoch=7")
    message = refused(
        "pretrain", "--config", TINY, "--data", scenes.store.url, "--out", tmp_path / "run",
        RAY_ADDRESS="127.0.0.1:9",
    )  # fmt: skip
    assert "no Ray cluster is reachable at this address" in message
    assert not (tmp_path / "run").exists()  # nothing was written
    shutil.copytree(scenes.store.root, tmp_path / "newer")
    manifest = tmp_path / "newer" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 3'))
    assert "upgrade maestream" in pretrain(tmp_path / "newer")
    assert "no such config" in refused(
        "pretrain", "--config", "recipes/none.yaml", "--data", scenes.store.url, "--out", tmp_path / "run"
    )
    assert "ranks go from 0 to 1" in refused(
        "order", scenes.store.url, "--global-batch", 8, "--world-size", 2, "--rank", 2
    )


def test_reconstruct_needs_a_run(scenes: Dataset, tmp_path: Path) -> None:
    message = refused("reconstruct", tmp_path, "--data", scenes.store.url, "--grid", tmp_path / "r.png")
    assert "is not a run" in message


def test_bench_loader_prints_a_table_and_writes_all_numbers(scenes: Dataset, tmp_path: Path) -> None:
    words = ["bench", "loader", scenes.store.url, "--global-batch", "24", "--size", "32", "--seconds", "1"]
    words += ["--cache", str(tmp_path / "kept"), "--cache-gb", "1", "--json", str(tmp_path / "b.json")]
    out = maestream(*words).stdout
    result = json.loads((tmp_path / "b.json").read_text())
    assert {"date", "cpu", "cores", "threads", "size", "global_batch", "cache_gb"} < result.keys()
    assert result["command"] == shlex.join(["maestream", *words])
    (dataset,) = result["datasets"]
    assert dataset["fingerprint"] == scenes.fingerprint
    assert dataset["samples"] == 70
    assert "one core that only decodes and resizes" in out
    assert "cpu" in [row["executor"] for row in result["rows"]]
    for row in result["rows"]:
        assert f"{row['executor']}: " in out
        assert f"{row['img_per_s']:,.0f}" in out
    assert list((tmp_path / "kept").glob("maestream-*"))


def test_invalid_bench_options_are_refused(scenes: Dataset, tmp_path: Path) -> None:
    def bench(*words: object) -> str:
        return refused("bench", "loader", *words)

    assert "not a dataset" in bench(tmp_path)
    assert "not a dataset" in bench(scenes.store.url, tmp_path, "--global-batch", 24)
    assert "fewer than one global batch of 256" in bench(scenes.store.url)
    small = scenes.store.url, "--global-batch", 24
    assert "cache and cache_gb must be set together" in bench(*small, "--cache", tmp_path)
    assert "choose another folder" in bench(*small, "--seconds", 1, "--cache", "/proc/x", "--cache-gb", 1)


def test_an_interrupted_bench_leaves_no_processes(scenes: Dataset) -> None:
    words = [
        "bench",
        "loader",
        scenes.store.url,
        "--global-batch",
        "24",
        "--seconds",
        "3",
        "--decoder",
        "cpu",
    ]
    bench = subprocess.Popen(
        [Path(sys.executable).with_name("maestream"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (
        fetchers := [
            pid for pid in processes("pipeline.loading.fetch_process", bench.pid) if pid != bench.pid
        ]
    ):
        assert bench.poll() is None
        time.sleep(0.05)
    os.killpg(bench.pid, signal.SIGINT)
    out, error = bench.communicate(timeout=60)
    assert (bench.returncode, out, error.strip()) == (130, "", "maestream: interrupted")
    assert not set(fetchers) & set(processes("pipeline.loading.fetch_process"))
