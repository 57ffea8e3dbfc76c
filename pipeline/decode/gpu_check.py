"""Compare DALI's crops on a GPU with the CPU's, before a worker decodes on that GPU.

nvImageCodec 0.9.0, which comes with DALI 2.4, is reported to decode regions of images incorrectly on GPUs: it fails
with an error on some (A100) and with a segmentation fault on others (H100), see NVIDIA/nvImageCodec#55. So the check
runs in a process of its own, on generated images:

    python -m pipeline.decode.gpu_check cuda:0      # prints what differs; nothing if all crops match
"""

import io
import os
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.decode.decoder import Decoder

SIZE = 64  # height and width of the resized crops, pixels
MAX_DIFFERENCE = 2.0  # mean difference allowed for a crop, in grey levels; a shift by one pixel gives 8
TIMEOUT_S = 120
# (width, height, chroma subsampling as in Pillow: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0). The first three have the sizes
# of ImageNet photographs.
IMAGES = [(500, 375, 2), (375, 500, 2), (500, 333, 0), (333, 251, 1), (161, 203, 2), (97, 131, 0)]
BATCH_SIZES = (1, 7)  # tried besides the whole set: a GPU decodes single images and small batches differently


class Crops(NamedTuple):
    """n crops to decode."""

    encoded: list[bytes]  # n JPEGs
    boxes: npt.NDArray[np.int64]  # [n, 4]: (y, x, height, width)
    flips: npt.NDArray[np.bool_]  # [n]
    names: list[str]  # n descriptions of the images, for messages


def make_crops() -> Crops:
    """Crops at the corners, at the edges, inside and of the whole of every image. Always the same ones."""
    rng = np.random.default_rng(0)
    encoded, boxes, names = [], [], []
    for width, height, subsampling in IMAGES:
        file = io.BytesIO()
        _draw(rng, width, height).save(file, "JPEG", quality=92, subsampling=subsampling)
        h, w = rng.integers(40, 91, (2, 8)).tolist()
        for i, (y, x) in enumerate([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), *rng.random((4, 2))]):
            box = (int(y * (height - h[i])), int(x * (width - w[i])), h[i], w[i])
            boxes.append(box)
        boxes.append((0, 0, height, width))
        encoded += [file.getvalue()] * 9
        names += [f"{width} × {height}, 4:{('4:4', '2:2', '2:0')[subsampling]}"] * 9
    return Crops(encoded, np.array(boxes), np.arange(len(boxes)) % 2 == 1, names)


def _draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An image with grey detail of about five pixels, so that a shift by one pixel shows, and with colours that change
    slowly, so that different ways to interpolate chroma do not show."""

    def clouds(pixels: int, colours: int) -> npt.NDArray[np.float64]:
        shape = (height // pixels + 2, width // pixels + 2, colours)
        small = [Image.fromarray(rng.integers(0, 256, shape[:2], np.uint8)) for _ in range(colours)]
        large = [np.asarray(s.resize((width, height), Image.Resampling.BICUBIC)) for s in small]
        return np.stack(large, axis=2).astype(np.float64)

    return Image.fromarray((clouds(5, 1) * 0.6 + clouds(60, 3) * 0.4).astype(np.uint8))


def crop_mismatch(decoder: Decoder, reference: Decoder) -> str | None:
    """How a decoder's crops differ from the reference's; None if they match. Both make crops of SIZE × SIZE."""
    crops = make_crops()
    expected = reference(crops.encoded, crops.boxes, crops.flips).images.cpu().float()
    for n in (len(crops.encoded), *BATCH_SIZES):
        decoded = decoder(crops.encoded[:n], crops.boxes[:n], crops.flips[:n])
        if decoded.bad:
            i, reason = next(iter(decoded.bad.items()))
            return f"{len(decoded.bad)} of {n} crops cannot be decoded ({_name(crops, i)}: {reason})"
        difference = (decoded.images.cpu().float() - expected[:n]).abs().mean(dim=(1, 2, 3))
        if (different := difference > MAX_DIFFERENCE).any():
            i = int(difference.argmax())
            return (
                f"{int(different.sum())} of {n} crops differ from the CPU's (by {difference[i]:.0f} of 255 on average for "
                f"{_name(crops, i)})"
            )
    return None


def _name(crops: Crops, i: int) -> str:
    y, x, height, width = crops.boxes[i].tolist()
    return f"{crops.names[i]}: {width} × {height} at {x}, {y}"


def gpu_crop_mismatch(device: torch.device) -> str | None:
    """How DALI's crops on a CUDA device differ from the CPU's, or how the check failed; None if they match.

    Takes some seconds: it starts a process, because a crash in the GPU's decoder would end this one.
    """
    return run_check([sys.executable, "-P", "-m", "pipeline.decode.gpu_check", str(device)])


def run_check(command: list[str]) -> str | None:
    """Run a check that prints a problem. Returns the problem, or how the check failed; None if all is well."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return f"the check did not finish within {TIMEOUT_S} s"
    if done.returncode < 0:
        return f"the check crashed with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return f"the check failed ({done.stderr.strip().rpartition(chr(10))[2]})"
    return done.stdout.strip() or None


def main(device: str) -> None:
    from pipeline.decode.cpu import CpuDecoder
    from pipeline.decode.dali import DaliDecoder

    size = (SIZE, SIZE)
    print(crop_mismatch(DaliDecoder(size, 4, torch.device(device)), CpuDecoder(size, 4)) or "")


if __name__ == "__main__":
    main(*sys.argv[1:])
