"""Choose and make a decoder."""

import logging

import torch

from pipeline.decode.cpu import CpuDecoder
from pipeline.decode.decoder import Decoder, DecoderName, Size
from pipeline.errors import UserError
from pipeline.images.pixels import RGB, Pixels

CPU = torch.device("cpu")
log = logging.getLogger("maestream")


def make_decoder(
    name: DecoderName,
    size: int | Size,
    threads: int,
    device: torch.device = CPU,
    pixels: Pixels = RGB,
) -> Decoder:
    """A decoder of the given name.

    `auto` is DALI on a CUDA device if its crops match the CPU's there (checking that takes some seconds). Otherwise it
    is `cpu`, with a warning if there is a CUDA device. Without a GPU, `cpu` is about three times as fast as DALI
    (224-pixel crops of ImageNet photographs, `maestream bench loader`).

    Args:
        size: of the crops in pixels: (height, width), or one number for both.
        threads: number of decoding threads on the CPU.
        device: where the model is trained.
        pixels: type of the batches: the dataset's (`Manifest.pixels`), with the channels of the model. Grey images become
            RGB, and RGB images grey; an image of another type is a bad sample.

    Raises UserError if `dali` is asked for and not usable here.
    """
    size = (size, size) if isinstance(size, int) else size
    on_gpu = device.type == "cuda"
    if name == "dali" or (name == "auto" and on_gpu):
        try:
            from pipeline.decode.dali import DaliDecoder
        except ImportError as error:
            problem: str | None = f"DALI cannot be imported ({error}); it exists for linux x86_64 only"
        else:
            problem = _gpu_problem(device) if on_gpu else None
            if not problem:
                return DaliDecoder(size, threads, device if on_gpu else CPU, pixels)
        if name == "dali":
            raise UserError(f"data.decoder=dali cannot be used here: {problem}. Use data.decoder=cpu")
        log.warning("decoding images on the CPU: %s", problem)
    return CpuDecoder(size, threads, pinned=on_gpu, pixels=pixels)


def _gpu_problem(device: torch.device) -> str | None:
    """Why DALI cannot be trusted on this CUDA device, and what to do; None if it can."""
    from pipeline.decode.gpu_check import gpu_crop_mismatch

    problem = gpu_crop_mismatch(device)
    return problem and (
        f"DALI decodes crops incorrectly on {device}: {problem}. nvImageCodec 0.9.0 has this bug "
        "(NVIDIA/nvImageCodec#55): install nvidia-dali-cuda120==2.2.0, which comes with 0.8"
    )
