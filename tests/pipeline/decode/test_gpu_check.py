"""A GPU is used for decoding only if its crops match the CPU's: shifts by a pixel, errors and crashes are detected."""

import logging
import signal
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pipeline.decode.cpu import CpuDecoder
from pipeline.decode.decoder import Decoded, Decoder, Encoded
from pipeline.decode.factory import make_decoder
from pipeline.decode.gpu_check import SIZE, crop_mismatch, gpu_crop_mismatch, make_crops, run_check
from pipeline.errors import UserError

pytestmark = pytest.mark.integration
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")


@pytest.fixture
def cpu() -> Decoder:
    return CpuDecoder((SIZE, SIZE), 2)


def test_dali_and_cpu_agree(cpu: Decoder) -> None:
    pytest.importorskip("nvidia.dali")
    assert crop_mismatch(make_decoder("dali", SIZE, 2), cpu) is None
    assert gpu_crop_mismatch(torch.device("cpu")) is None  # the same in a separate process


class Wrong:
    """A decoder that moves every ninth box, or truncates every ninth image."""

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
def test_a_shift_by_a_pixel_is_detected(cpu: Decoder, move: tuple[int, int, int, int]) -> None:
    problem = crop_mismatch(Wrong(move, cut=False), cpu)
    assert problem is not None
    assert problem.startswith(
        f"{len(make_crops().encoded) // 9} of {len(make_crops().encoded)} crops differ from the CPU's"
    )
    assert "4:4:4" in problem or "4:2:2" in problem or "4:2:0" in problem


def test_undecodable_crops_are_detected(cpu: Decoder) -> None:
    problem = crop_mismatch(Wrong((0, 0, 0, 0), cut=True), cpu)
    assert problem is not None
    assert "6 of 54 crops cannot be decoded (500 × 375, 4:2:0: " in problem


def test_a_crash_is_detected() -> None:
    crash = "import os, signal, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), {})"
    for number in (signal.SIGSEGV, signal.SIGABRT):
        assert number.name in str(run_check([sys.executable, "-c", crash.format(int(number))]))
    assert "no such thing" in str(run_check([sys.executable, "-c", "raise RuntimeError('no such thing')"]))
    assert run_check([sys.executable, "-c", "print()"]) is None


@without_gpu
def test_auto_warns_why_it_does_not_decode_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "maestream"):
        decoder = make_decoder("auto", 32, 1, torch.device("cuda"))
    assert isinstance(decoder, CpuDecoder)
    (record,) = caplog.records
    assert record.getMessage().startswith("decoding images on the CPU: DALI")


@without_gpu
def test_an_unusable_dali_is_an_error_with_a_remedy() -> None:
    with pytest.raises(
        UserError, match=r"data\.decoder=dali cannot be used here: DALI.*Use data\.decoder=cpu"
    ):
        make_decoder("dali", 32, 1, torch.device("cuda"))
