"""`maestream bench step` and `bench end-to-end`: printed and written numbers are consistent."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cluster.cli.bench.end_to_end import result_lines
from cluster.cli.bench.step import add_speedups
from pipeline.dataset.dataset import Dataset
from tests.support.command_line import printed, refused

pytestmark = pytest.mark.integration

TINY = "recipes/pretrain_vit_tiny.yaml"
SMALL = ("model.image_size=32", "model.patch_size=8", "model.width=24", "model.depth=1", "model.heads=3")
QUICK = ("--batch", 4, "--seconds", 0.2)


def test_bench_step_measures_the_three_variants(tmp_path: Path) -> None:
    out = printed("bench", "step", TINY, *SMALL, *QUICK, "--json", tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["precision"] == "float32"
    assert not result["compiled"]
    baseline, eight, one = result["rows"]
    assert baseline["faster"] == baseline["faster_by_flops"] == 1
    assert 1 < eight["faster_by_flops"] < one["faster_by_flops"]
    for row in result["rows"]:
        assert row["batch"] == 4
        assert f"{row['img_per_s']:,.1f}" in out
        assert row["tflop_per_s"] == pytest.approx(row["img_per_s"] * row["gflop_per_image"] / 1000)
        assert row["of_peak"] > 0
        assert row["peak_gb"] is None
        assert min(row[part] for part in ("forward_ms", "backward_ms", "optimizer_ms")) > 0


def test_published_speedups_are_shown_for_the_papers_models_only() -> None:
    def row(recipe: str, what: str, rate: float, gflop: float) -> dict:
        return {"recipe": recipe, "what": what, "img_per_s": rate, "gflop_per_image": gflop}

    rows = [
        row(recipe, what, rate, gflop)
        for recipe in ("large", "own")
        for what, rate, gflop in (
            ("mask tokens in the encoder, 8 blocks", 10.0, 90.0),
            ("8 blocks", 28.0, 30.0),
            ("1 block", 37.0, 18.0),
        )
    ]
    add_speedups(rows, {"large": 1024, "own": 192})
    assert [row["paper"] for row in rows] == [None, 2.8, 3.7, None, None, None]
    assert [row["faster"] for row in rows[:3]] == [1, 2.8, 3.7]
    assert [row["faster_by_flops"] for row in rows[:3]] == [1, 3, 5]


def test_bench_end_to_end(scenes: Dataset, tmp_path: Path) -> None:
    picture, file = tmp_path / "step.png", tmp_path / "b.json"
    out = printed(
        "bench", "end-to-end", scenes.store.url, "--config", TINY, *SMALL, *QUICK, "--picture", picture, "--json", file
    )  # fmt: skip
    result = json.loads(file.read_text())
    loader, step, both = (result[part] for part in ("loader", "step", "both"))
    assert result["bound"] == ("loader" if loader["img_per_s"] < step["img_per_s"] else "step")
    assert f"{both['img_per_s']:,.0f} img/s: {result['of_slower']:.1%} of the slower one" in out
    assert f"bottleneck: the {result['bound']}" in out
    assert "loader and step share the CPU cores" in out
    assert sum(both["shares"].values()) == pytest.approx(1)
    assert {"data_wait", "host_to_device", "step"} <= {
        part for part, share in both["shares"].items() if share
    }
    with Image.open(picture) as image:
        assert image.width == 1000


def test_advice_depends_on_the_bottleneck() -> None:
    def advice(loader: float, busy: dict[str, float]) -> str:
        result = {
            "loader": {"img_per_s": loader, "busy": busy, "bad_samples": 3},
            "step": {"img_per_s": 100.0},
            "both": {"img_per_s": 90.0, "shares": {"data_wait": 0.2, "step": 0.8}},
            "bound": "loader" if loader < 100 else "step",
            "of_slower": 0.9,
        }
        return "\n".join(result_lines(result, shares_cores=False))

    busy = {"storage": 0.1, "reading": 0.1, "decoding": 0.9}
    assert "The loader alone is 3.00 times as fast" in advice(300, busy)
    assert "More cores would help" in advice(90, busy)
    assert "--cache" in advice(90, busy | {"storage": 0.85, "decoding": 0.2})
    assert "More workers on the machine" in advice(90, busy | {"reading": 0.85, "decoding": 0.2})
    assert "share the CPU cores" not in advice(90, busy)
    assert "3 bad samples" in advice(90, busy)


def test_invalid_recipes_and_options_are_refused(scenes: Dataset, tmp_path: Path) -> None:
    assert "give at least one recipe" in refused("bench", "step", "model.depth=1")
    assert "no such config" in refused("bench", "step", tmp_path / "none.yaml")
    assert "did you mean depth?" in refused("bench", "step", TINY, "model.dept=1")
    data = scenes.store.url
    assert "not a dataset" in refused("bench", "end-to-end", tmp_path, "--config", TINY)
    assert "fewer than one global batch" in refused(
        "bench", "end-to-end", data, "--config", TINY, "--batch", 99
    )
    assert "set --batch here" in refused("bench", "end-to-end", data, "--config", TINY, "micro_batch=auto")
