"""Whether a GPU's slices are those of the CPU: asked before a worker trusts its GPU with decoding.

nvImageCodec 0.9.0, which DALI 2.4 brings, is reported to break the decoding of regions on GPUs: with an error on
some (A100), and with a segmentation fault on others (H100), see NVIDIA/nvImageCodec#55. So this is tried in a
process of its own, on pictures that are drawn here:

    python -m pipeline.decode.check cuda:0      # says what differs, and nothing if all is well
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

from pipeline.decode import Decoder

SIZE = 64  # pixels, of a crop's side
MOST = 2.0  # grey levels that a crop may differ on average; one that is a pixel off differs by 8
TIMEOUT_S = 120
# Width, height and chroma subsampling (Pillow's: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0); the first are photographs'.
PICTURES = [(500, 375, 2), (375, 500, 2), (500, 333, 0), (333, 251, 1), (161, 203, 2), (97, 131, 0)]


class Slices(NamedTuple):
    encoded: list[bytes]  # n of them
    boxes: npt.NDArray[np.int64]  # [n, 4]
    flips: npt.NDArray[np.bool_]  # [n]
    names: list[str]


def draw_slices() -> Slices:
    """Boxes at the corners and the edges, inside and around the whole of every picture. Always the same."""
    rng = np.random.default_rng(0)
    encoded, boxes, names = [], [], []
    for width, height, subsampling in PICTURES:
        file = io.BytesIO()
        _draw(rng, width, height).save(file, "JPEG", quality=92, subsampling=subsampling)
        h, w = rng.integers(40, 91, (2, 8)).tolist()
        for i, (y, x) in enumerate([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), *rng.random((4, 2))]):
            box = (int(y * (height - h[i])), int(x * (width - w[i])), h[i], w[i])
            boxes.append(box)
        boxes.append((0, 0, height, width))
        encoded += [file.getvalue()] * 9
        names += [f"{width} × {height}, 4:{('4:4', '2:2', '2:0')[subsampling]}"] * 9
    return Slices(encoded, np.array(boxes), np.arange(len(boxes)) % 2 == 1, names)


def _draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Grey detail of some five pixels, so that one pixel's shift shows, in soft colours, so that how chroma is
    interpolated does not."""

    def clouds(pixels: int, colours: int) -> npt.NDArray[np.float64]:
        shape = (height // pixels + 2, width // pixels + 2, colours)
        small = [Image.fromarray(rng.integers(0, 256, shape[:2], np.uint8)) for _ in range(colours)]
        large = [np.asarray(s.resize((width, height), Image.Resampling.BICUBIC)) for s in small]
        return np.stack(large, axis=2).astype(np.float64)

    return Image.fromarray((clouds(5, 1) * 0.6 + clouds(60, 3) * 0.4).astype(np.uint8))


def slices_differ(decoder: Decoder, reference: Decoder) -> str | None:
    """How a decoder's crops of SIZE pixels differ from the reference's; None if they do not."""
    slices = draw_slices()
    expected = reference(slices.encoded, slices.boxes, slices.flips).images.cpu().float()
    for n in (len(slices.encoded), 1, 7):  # a GPU decodes single images and small batches in other ways
        decoded = decoder(slices.encoded[:n], slices.boxes[:n], slices.flips[:n])
        if decoded.bad:
            i, reason = next(iter(decoded.bad.items()))
            return f"{len(decoded.bad)} of {n} do not decode ({_name(slices, i)}: {reason})"
        apart = (decoded.images.cpu().float() - expected[:n]).abs().mean(dim=(1, 2, 3))
        if (apart > MOST).any():
            i = int(apart.argmax())
            return (
                f"{int((apart > MOST).sum())} of {n} are not the CPU's (by {apart[i]:.0f} of 255 on average for "
                f"{_name(slices, i)})"
            )
    return None


def _name(slices: Slices, i: int) -> str:
    y, x, height, width = slices.boxes[i].tolist()
    return f"{slices.names[i]}: {width} × {height} at {x}, {y}"


def slices_differ_on(device: torch.device) -> str | None:
    """How DALI's crops on a CUDA device differ from the CPU's, or how it failed; None if all is well.

    Takes some seconds: it starts a process, which such a failure may end.
    """
    return _said_by([sys.executable, "-m", "pipeline.decode.check", str(device)])


def _said_by(command: list[str]) -> str | None:
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return f"trying it did not end within {TIMEOUT_S} s"
    if done.returncode < 0:
        return f"trying it ended with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return f"trying it failed ({done.stderr.strip().rpartition(chr(10))[2]})"
    return done.stdout.strip() or None


def main(device: str) -> None:
    from pipeline.decode.cpu import CpuDecoder
    from pipeline.decode.dali import DaliDecoder

    size = (SIZE, SIZE)
    print(slices_differ(DaliDecoder(size, 4, torch.device(device)), CpuDecoder(size, 4)) or "")


if __name__ == "__main__":
    main(*sys.argv[1:])
