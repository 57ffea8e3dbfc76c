"""Masked reconstructions: error, and pictures of original, masked and reconstructed images."""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from pipeline.arrays import Ints
from pipeline.build.file_names import IMAGE_EXTENSIONS, is_image
from pipeline.dataset.dataset import Dataset
from pipeline.decode.decoder import Decoder
from pipeline.errors import UserError
from pipeline.images.formats import image_info
from pipeline.loading.crops import CENTRE, centre_crops
from pipeline.loading.loader import Batch, aspect_of, centred_batch
from pipeline.pictures.bands import draw_bands, picture_bands
from pipeline.storage.store import Store
from pipeline.text import plural
from trainer.models.mae import MAE
from trainer.models.masking import masking_noise

log = logging.getLogger("maestream")
GREY = 128  # pixel value of masked patches in pictures
# Source of the mean and variance that turn normalised predictions into pixels: each patch's own, or the visible patches'.
Statistics = Literal["original", "visible"]
MASK_EPOCH = 2**31  # larger than any training epoch, so training never uses these masks


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of n images; pictures are uint8[n, 3, h, w], RGB, on the CPU."""

    originals: torch.Tensor  # three bands of the images
    masked: torch.Tensor  # the originals with grey masked patches
    pasted: torch.Tensor  # the originals with reconstructed masked patches
    error: float  # mean squared error over masked patches, in the space of the model's target
    baseline: float  # the same error if masked patches are filled with a mean, see `reconstruct`


@torch.no_grad()
def reconstruct(
    model: MAE,
    images: torch.Tensor,
    sample_ids: torch.Tensor,
    seed: int,
    statistics: Statistics = "original",
    bands: Sequence[int] | None = None,
) -> Reconstruction:
    """Mask and reconstruct images.

    For a model that predicts raw pixels, the baseline fills masked patches with the mean of the image's visible pixels, per
    colour. For a model that predicts normalised patches, error and baseline are in normalised space, and the baseline fills
    each masked patch with its own mean. Such a prediction lacks the patch's mean and variance; the picture gets them as
    `statistics` says.

    Args:
        images: pixels [n, c, h, w] of the model's type, on the model's device.
        sample_ids: int64[n], on the same device; with `seed` they determine the masks.
        statistics: mean and variance for the picture: "original", each patch's own, or "visible", the means of those of the
            image's visible patches, so that nothing is revealed about masked patches.
        bands: the channels in the pictures, see `picture_bands`. Those of other than 8-bit images are scaled to the range of
            two standard deviations around the mean by which the model normalises.
    """
    shown = picture_bands(model.channels, bands)
    was_training = model.training
    model.eval()
    pixels = model.normalise(images)
    patches = model.patchify(pixels)
    noise = masking_noise(model.config, seed, MASK_EPOCH, sample_ids)
    prediction, masked = model.predict(pixels, noise)
    target = model.target(patches)
    in_masked = masked[..., None].expand_as(patches)
    error = (prediction - target)[in_masked].square().mean().item()

    if model.config.norm_pix:
        baseline = torch.zeros_like(target)
        mean = patches.mean(dim=-1, keepdim=True)
        variance = patches.var(dim=-1, keepdim=True)
        if statistics == "visible":
            mean, variance = mean_over_visible(mean, masked), mean_over_visible(variance, masked)
        pixel_prediction = prediction * (variance + 1e-6).sqrt() + mean
    else:
        colours = patches.unflatten(-1, (-1, model.channels))  # [n, L, p · p, c]
        visible = (~masked)[..., None, None]
        mean = (colours * visible).sum(dim=(1, 2)) / (visible.sum(dim=(1, 2)) * colours.shape[2])  # [n, c]
        baseline = mean[:, None, None, :].expand_as(colours).flatten(-2)
        pixel_prediction = prediction
    baseline_error = (baseline - target)[in_masked].square().mean().item()

    def draw(pixels: torch.Tensor) -> torch.Tensor:
        contrast = None if model.pixel_dtype == "uint8" else (model.pixel_mean, model.pixel_std)
        return draw_bands(pixels, shown, contrast).cpu()

    originals = draw(model.scale(images))
    is_masked = model.unpatchify(in_masked.to(patches.dtype))[:, :1].bool().cpu()
    model.train(was_training)
    return Reconstruction(
        originals=originals,
        masked=torch.where(is_masked, torch.tensor(GREY, dtype=torch.uint8), originals),
        pasted=torch.where(
            is_masked,
            draw(model.unpatchify(pixel_prediction) * model.pixel_std + model.pixel_mean),
            originals,
        ),
        error=error,
        baseline=baseline_error,
    )


def mean_over_visible(values: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Average float[n, L, 1] over visible patches → float[n, 1, 1]. `masked`: bool[n, L]."""
    visible = (~masked)[..., None].to(values.dtype)
    return (values * visible).sum(dim=1, keepdim=True) / visible.sum(dim=1, keepdim=True)


def read_image_folder(store: Store, decoder: Decoder, count: int) -> torch.Tensor:
    """Read centre crops of the first `count` images of a folder, in the order of their names → pixels [n, c, h, w].

    Images that cannot be read are skipped with a warning. Raises UserError if none can be read.
    """
    names = [name for name in store.names() if is_image(name)]
    if not names:
        raise UserError(f"{store.url} has no images ({', '.join(IMAGE_EXTENSIONS)})")
    crops: list[torch.Tensor] = []
    for name in names:
        if len(crops) == count:
            break
        try:
            crops.append(_centre_crop(store.read(name), decoder))
        except ValueError as error:
            log.warning("%s is skipped: %s", store.describe(name), error)
    if not crops:
        raise UserError(f"{store.url}: none of its {plural(len(names), 'image')} can be read")
    return torch.cat(crops)


def _centre_crop(data: bytes, decoder: Decoder) -> torch.Tensor:
    """Decode the centre crop of an encoded image → pixels [1, c, h, w]. Raise ValueError with the reason if that fails."""
    info = image_info(lambda at, size: data[at : at + size], len(data))
    box = centre_crops(np.array([info.height]), np.array([info.width]), CENTRE, aspect_of(decoder))
    decoded = decoder([data], box, np.zeros(1, bool))
    if decoded.bad:
        raise ValueError(decoded.bad[0])
    return decoded.images


def evenly_spaced_ids(dataset: Dataset, count: int) -> Ints:
    """Return up to `count` sample ids spread evenly over a dataset, int64[n]."""
    return np.unique(np.linspace(0, dataset.samples - 1, min(count, dataset.samples)).astype(np.int64))


def load_evenly_spaced(dataset: Dataset, decoder: Decoder, count: int) -> Batch:
    """Load centre crops of up to `count` samples spread evenly over a dataset, without those that cannot be read.

    Raises UserError if none can be read.
    """
    ids = evenly_spaced_ids(dataset, count)
    batch = centred_batch(dataset, decoder, ids)
    good = batch.weights > 0
    if not good.any():
        raise UserError(
            f"{dataset.store.url}: none of {plural(len(ids), 'sample')} can be decoded: run `maestream shards verify`"
        )
    images, labels, sample_ids = batch.images[good], batch.labels[good], batch.sample_ids[good]
    return Batch(images, labels, sample_ids, batch.weights[good], {}, batch.stage_times)


def draw_grid(result: Reconstruction, columns: int = 2, rows: int = 6) -> bytes:
    """Draw a PNG of the first columns · rows images, each as a triple: original, masked, reconstruction."""
    n = min(len(result.originals), columns * rows)
    size, gap, head = max(*result.originals.shape[2:], 160), 4, 18
    columns = min(columns, n)
    triple = 3 * (size + gap) + 3 * gap
    sheet = Image.new("RGB", (columns * triple + gap, head + -(-n // columns) * (size + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(n):
        left, top = gap + (i % columns) * triple, head + (i // columns) * (size + gap)
        for k, images in enumerate((result.originals, result.masked, result.pasted)):
            picture = Image.fromarray(images[i].permute(1, 2, 0).contiguous().numpy())
            sheet.paste(ImageOps.contain(picture, (size, size)), (left + k * (size + gap), top))
            if i < columns:
                draw.text(
                    (left + k * (size + gap), 3), ("original", "masked", "reconstruction")[k], fill="black"
                )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
