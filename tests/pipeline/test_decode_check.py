"""A GPU decodes only if its slices are the CPU's: what is off by a pixel, fails or crashes is found out before."""

import logging
import signal
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pipeline.decode import Decoded, Decoder, Encoded, make_decoder
from pipeline.decode.check import SIZE, _said_by, draw_slices, slices_differ, slices_differ_on
from pipeline.decode.cpu import CpuDecoder
from pipeline.errors import UserError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where the GPU cannot be had")


@pytest.fixture
def cpu() -> Decoder:
    return CpuDecoder((SIZE, SIZE), 2)


def test_dali_and_cpu_agree(cpu: Decoder) -> None:
    pytest.importorskip("nvidia.dali")
    assert slices_differ(make_decoder("dali", SIZE, 2), cpu) is None
    assert slices_differ_on(torch.device("cpu")) is None  # the same, in a process of its own


class Wrong:
    """An executor whose every ninth box is moved, or whose every ninth image is cut off."""

    def __init__(self, move: tuple[int, int, int, int], cut: bool) -> None:
        self.right, self.move, self.cut = CpuDecoder((SIZE, SIZE), 2), np.array(move), cut

    def __call__(self, encoded: Sequence[Encoded], boxes: np.ndarray, flips: np.ndarray) -> Decoded:
        boxes = boxes.copy()
        boxes[4::9] += self.move
        cut = [data[:200] if self.cut and i % 9 == 4 else data for i, data in enumerate(encoded)]
        return self.right(cut, boxes, flips)

    def close(self) -> None:
        self.right.close()


@pytest.mark.parametrize("move", [(1, 0, 0, 0), (0, -1, 0, 0), (0, 0, 0, -2), (-1, 0, 1, 0)])
def test_a_pixel_off_is_found_out(cpu: Decoder, move: tuple[int, int, int, int]) -> None:
    problem = slices_differ(Wrong(move, cut=False), cpu)
    assert problem is not None
    assert problem.startswith(
        f"{len(draw_slices().encoded) // 9} of {len(draw_slices().encoded)} are not the CPU's"
    )
    assert "4:4:4" in problem or "4:2:2" in problem or "4:2:0" in problem


def test_what_does_not_decode_is_found_out(cpu: Decoder) -> None:
    problem = slices_differ(Wrong((0, 0, 0, 0), cut=True), cpu)
    assert problem is not None
    assert "6 of 54 do not decode (500 × 375, 4:2:0: " in problem


def test_a_crash_is_found_out() -> None:
    crash = "import os, signal, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), {})"
    for number in (signal.SIGSEGV, signal.SIGABRT):
        assert number.name in str(_said_by([sys.executable, "-c", crash.format(int(number))]))
    assert "no such thing" in str(_said_by([sys.executable, "-c", "raise RuntimeError('no such thing')"]))
    assert _said_by([sys.executable, "-c", "print()"]) is None


@without_gpu
def test_auto_says_why_it_does_not_decode_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "maestream"):
        decoder = make_decoder("auto", 32, 1, torch.device("cuda"))
    assert isinstance(decoder, CpuDecoder)
    (record,) = caplog.records
    assert record.getMessage().startswith("images are decoded on the CPU: DALI")


@without_gpu
def test_dali_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        UserError, match=r"data\.decoder=dali cannot be used here: DALI.*data\.decoder=cpu can"
    ):
        make_decoder("dali", 32, 1, torch.device("cuda"))
