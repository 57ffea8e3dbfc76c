"""`maestream report`: one self-contained HTML page of a run, complete or not."""

import base64
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset.dataset import Dataset
from pipeline.storage.store import open_store
from tests.support.command_line import printed, refused
from trainer.config.recipe import CONFIG_TYPES, parse_config
from trainer.group.requests import Request
from trainer.run.events import EVENTS
from trainer.run.metrics import METRICS, read_metrics
from trainer.run.run import FAILED, LEASE, RUN, create_run, open_run
from trainer.run.step_timer import PARTS
from trainer.run.summary import BINS, curve, summarise, time_spent, world_over_time
from trainer.run.worker import Callbacks, Worker
from trainer.train.registry import TRAIN_FUNCTIONS
from trainer.weights.init import resolve_init

pytestmark = pytest.mark.integration

SMALL: dict[str, Any] = {
    "global_batch": 12,
    "epochs": 4.0,  # of 5 steps
    "log_every": 4,
    "micro_batch": 12,
    "model": {"image_size": 32, "patch_size": 8, "width": 24, "depth": 1, "heads": 3},
    "optim": {"blr": 0.05, "warmup_epochs": 1},
    "data": {"decoder": "cpu", "lanes": 4, "block": 8, "threads": 1},
    "checkpoint": {"every_steps": 3, "snapshots": None},
}
SECTIONS = (
    "Loss and learning rate", "Throughput and time use", "Workers and events", "Bad samples",
    "Reconstructions", "Evaluations", "Versions", "Config",
)  # fmt: skip
SCRIPT = "<script>alert('boo')</script>"
EXAMPLE_EVENTS = [
    {"time": 1e9, "event": "attempt", "attempt": 1, "step": 0, "world_size": 2},
    {"time": 1e9 + 30, "event": "failure", "cause": f"worker 1 died {SCRIPT}", "again": True},
    {"time": 1e9 + 40, "event": "attempt", "attempt": 2, "step": 7, "world_size": 1}
    | {"redone": 2, "gap_s": 9.5},
    {"time": 1e9 + 45, "event": "evaluated", "step": 20, "val_top1": 1.0},
    {"time": 1e9 + 50, "event": "a later version's", "cause": "unknown"},
]
BAD = {"sample": 3, "key": f"a/{SCRIPT}", "shard": "s.tar", "offset": 512, "reason": "it does not decode"}


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run: object, out: Path) -> Page:
    printed("report", run, "--out", out)
    return Page(out.read_text())


def train(task: str, dataset: Dataset, out: Path, stop: int = 0, **changes: Any) -> None:
    """Train; stop after step `stop` unless it is 0."""
    config = resolve_init(parse_config(CONFIG_TYPES[task], {**SMALL, **changes}, "test"))
    config, run = open_run(str(out), config, dataset)
    create_run(config, run, dataset)
    calls = itertools.count(1)
    TRAIN_FUNCTIONS[task](
        config,
        dataset,
        run,
        Worker(),
        Callbacks(lambda: Request.SAVE if next(calls) == stop else Request.NONE),
    )


@pytest.fixture(scope="module")
def trained(scenes: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts whose folder has every kind of file."""
    out = tmp_path_factory.mktemp("trained") / "run"
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    knn = {"val": scenes.store.url, "every": 1.0, "known": 20, "asked": 10}
    for stop in (7, 0):
        train("pretrain", scenes, out, stop, model=SMALL["model"] | decoder, knn=knn)
    (out / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in EXAMPLE_EVENTS) + '{"cut sho')
    (out / "bad-samples.json").write_text(json.dumps([BAD]))
    (out / "evaluations").mkdir()
    judged = {"step": 20, "data": "s3://me:pass-word@host/shards", "crop": 0.875, "val_top1": 71.25}
    (out / "evaluations" / "step-00000020.json").write_text(json.dumps(judged))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_page_shows_everything(run: Path, tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "report.html")
    rows = read_metrics(open_store(str(run)))
    for text in (
        *SECTIONS,
        *(
            "20",
            "100% of 20: 4.0 of 4 epochs",
            "done: all steps are trained and saved in a checkpoint",
            f"{rows[-1]['loss']:.4f}",
        ),
        "attempt 2: 1 worker resumes at step 7; 2 steps repeated, 9.5 s without training",
        *("a later version's", "2001-09-09", "s.tar", "after step 20", "71.25"),
        *("attempts 1 to 2", "maestream 0.", "lanes: 4"),
        f"{next(row['knn_top1'] for row in reversed(rows) if 'knn_top1' in row):.2f}",
    ):
        assert text in page.text, text
    assert "Not shown" not in page.text
    assert len(page.all("svg")) == 6
    drawn = [attributes["src"] for attributes in page.all("img")]
    assert len(drawn) == 6 < len(list((run / "pictures").iterdir()))
    for source in drawn:
        with Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2]))) as image:
            assert image.format == "JPEG"
    assert page.all("img")[0]["alt"] == "original, masked and reconstructed images after step 0"
    assert page.all("img")[-1]["alt"] == "original, masked and reconstructed images after step 20"


def test_the_page_is_self_contained(run: Path, tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "report.html")
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert str(value).startswith(("data:image/jpeg;base64,", "#")), value
            assert not name.startswith("on")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    # Curves use the page's colours, and ids are unique.
    assert not re.search(r"#0a0b[0-9a-f]{2}", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_text_is_escaped_and_secrets_are_masked(run: Path, tmp_path: Path) -> None:
    (run / FAILED).write_text(json.dumps({"attempt": 2, "reason": f"no access {SCRIPT} \ud800"}))
    (run / LEASE).write_text(json.dumps({"owner": "0123", "pid": SCRIPT, "host": SCRIPT}))
    with (run / "config.yaml").open("a") as file:
        file.write(f"# {SCRIPT} https://host/a?X-Amz-Signature=pass-word&b AKIAABCDEFGHIJKLMNOP\n")
    page = page_of(run, tmp_path / "report.html")
    assert page.text.count(SCRIPT) == 4
    assert not page.all("script")
    assert "pass-word" not in page.text
    assert "AKIA" not in page.text
    assert "s3://…@host/shards" in page.text


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (METRICS, "No metrics yet"),
        (EVENTS, "There are no events"),
        ("bad-samples.json", "There are none"),
        ("pictures", "There are no pictures"),
        ("evaluations", "Top-1 accuracy during training"),
        ("checkpoints", "there is no checkpoint: run the same command again to resume"),
        ("tensorboard", "done"),
    ],
)
def test_missing_files_are_explained(run: Path, tmp_path: Path, missing: str, text: str) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run, tmp_path / "report.html")
    assert text in page.text
    for title in SECTIONS:
        assert title in page.text


@pytest.mark.parametrize("epochs", [1.0, 0.4])
def test_a_finished_run_of_at_most_one_epoch_is_done(epochs: float, scenes: Dataset, tmp_path: Path) -> None:
    optim = SMALL["optim"] | {"warmup_epochs": 0}
    model = SMALL["model"] | {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    train("pretrain", scenes, tmp_path / "run", epochs=epochs, optim=optim, model=model)
    page = page_of(tmp_path / "run", tmp_path / "report.html")
    assert "done: all steps are trained and saved in a checkpoint" in page.text
    assert f"100% of {round(5 * epochs)}:" in page.text


def test_a_run_without_steps(run: Path, tmp_path: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("config.yaml", RUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    known = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({"run_id": known["run_id"], "fingerprint": "f", "starts": []}))
    (run / LEASE).write_text(json.dumps({"owner": "0123", "pid": 7, "host": "here"}))
    page = page_of(run, tmp_path / "report.html")
    for text in (
        "running",
        "process 7 on here",
        "No metrics yet",
        "not been evaluated",
        "did not record versions",
    ):
        assert text in page.text
    assert not page.all("svg")


def test_runs_of_older_versions_and_damaged_files(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    known = json.loads((run / RUN).read_text())
    assert known.pop("steps_per_epoch") == 5
    (run / RUN).write_text(json.dumps(known))
    assert summarise(open_store(str(run))).total_steps == 20
    for line in lines[: len(lines) // 2]:
        del line["time"]
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = time_spent(summarise(open_store(str(run))))
    rows = read_metrics(open_store(str(run)))
    assert spent["unmeasured"] > 0
    assert sum(spent.values()) == pytest.approx(sum(row["step_s"] for row in rows) + 9.5)
    for line in lines:
        line.pop("time", None)
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "bad-samples.json").write_text("[{")
    (run / FAILED).write_text("[]")
    pictures = sorted((run / "pictures").iterdir())
    pictures[0].write_bytes(pictures[0].read_bytes()[:1000])
    page = page_of(run, tmp_path / "report.html")
    assert "did not measure the parts of a step" in page.text
    assert f"cannot be read: failed.json, bad-samples.json, pictures/{pictures[0].name}" in page.text
    assert len(page.all("img")) == 5


@pytest.mark.parametrize("task", ["finetune", "linprobe"])
def test_runs_with_labels(task: str, scenes: Dataset, tmp_path: Path) -> None:
    data = SMALL["data"] | {"val": scenes.store.url, "val_crop": 1.0}
    train(task, scenes, tmp_path / "run", init="scratch", epochs=2.0, data=data)
    page = page_of(tmp_path / "run", tmp_path / "report.html")
    last = read_metrics(open_store(str(tmp_path / "run")))[-1]
    for text in (task, "only pre-training makes them", f"{last['val_top1']:.2f}", f"{last['val_loss']:.4f}"):
        assert text in page.text


def test_a_long_run_makes_a_small_page_that_keeps_spikes(run: Path, tmp_path: Path) -> None:
    row = read_metrics(open_store(str(run)))[-1]
    noise = np.random.default_rng(0).random(200_000)
    noise[123_456] = 1000.0
    line = json.dumps(row | {"step": "STEP", "epoch": "EPOCH", "loss": "LOSS", "knn_step": "STEP"})
    line = re.sub('"([A-Z]+)"', r"%(\1)s", line) + "\n"
    with (run / METRICS).open("w") as file:
        for step, loss in enumerate(noise.tolist()):
            file.write(line % {"STEP": step, "EPOCH": step // 5, "LOSS": loss})
    many = [json.dumps(event | {"time": i}) for i in range(1000) for event in EXAMPLE_EVENTS]
    (run / EVENTS).write_text("\n".join(many))
    (run / "bad-samples.json").write_text(json.dumps([BAD] * 5000))
    page = page_of(run, out := tmp_path / "report.html")
    assert out.stat().st_size < 3e6
    assert "The newest 200 of 4000" in page.text
    drawn = curve(np.arange(200_000.0), noise)
    assert len(drawn.x) == BINS
    assert drawn.high.max() == 1000
    assert drawn.mean.mean() == pytest.approx(noise.mean())
    assert drawn.low.min() == noise.min()


def test_workers_over_time(run: Path) -> None:
    found = summarise(open_store(str(run)))
    assert [event["at"] for event in found.events] == [0, 9, 7, 20]
    *changes, (end, size) = world_over_time(found)
    assert changes == [(1e9, 2), (1e9 + 30, 0), (1e9 + 40, 1)]
    assert end >= 1e9 + 50
    assert size == 1


def test_reports_from_and_to_a_bucket(run: Path, s3: str) -> None:
    store = open_store(f"{s3}/runs/reported")
    names = {METRICS: "metrics/0002-00000020.jsonl", EVENTS: "events/0002-ab.jsonl"}
    for name in open_store(str(run)).names():
        if not name.startswith("tensorboard"):
            store.write(names.get(name, name), (run / name).read_bytes())
    printed("report", store.url, "--out", f"{s3}/reports/page.html")
    page = Page(open_store(f"{s3}/reports").read("page.html").decode())
    assert "100% of 20:" in page.text
    assert "2 steps repeated" in page.text
    assert len(page.all("img")) == 6


def test_folders_that_are_not_runs_are_refused(run: Path, scenes: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    for folder in (tmp_path / "none", scenes.store.url):
        assert "is not a run: it has no config.yaml" in refused("report", folder, "--out", out)
    (run / RUN).write_text("{}")
    assert "run.json is damaged" in refused("report", run, "--out", out)
    (run / RUN).unlink()
    assert "has not started" in refused("report", run, "--out", out)
    (run / "config.yaml").write_text("task: [")
    assert "config.yaml cannot be read" in refused("report", run, "--out", out)
    assert not out.exists()


def test_parts_have_names_and_colours() -> None:
    from cluster.report.page import PART_NAMES, TEMPLATE

    assert {*PARTS, "unmeasured", "restarts"} == PART_NAMES.keys()
    for part in PART_NAMES:
        assert TEMPLATE.read_text().count(f"--{part}: ") == 2  # in light and in dark
