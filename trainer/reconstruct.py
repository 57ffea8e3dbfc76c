"""Pictures of what the model sees: original, masked, reconstruction; and how far off it is."""

import io
import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from pipeline.augment import CENTRE, centre_crops
from pipeline.decode import Decoder
from pipeline.errors import UserError
from pipeline.image_size import image_size
from pipeline.items import IMAGE_EXTENSIONS, is_image
from pipeline.loader import Batch, aspect_of, centred_batch
from pipeline.manifest import Dataset
from pipeline.order import Ints
from pipeline.storage import Store
from trainer.mae import MAE
from trainer.masks import noise_of

GREY = 128
Statistics = Literal[
    "original", "visible"
]  # whose patches give normalised predictions their mean and variance
log = logging.getLogger("maestream")
MASK_EPOCH = 2**31  # no training epoch has it, so these masks are ones that were never trained on


@dataclass(frozen=True)
class Reconstruction:
    """n images. Pixels are uint8[n, 3, h, w]."""

    originals: torch.Tensor
    masked: torch.Tensor  # masked patches grey
    pasted: torch.Tensor  # the reconstruction, with the visible patches as they are
    error: float  # mean squared error over masked patches, in the model's target space
    baseline: float  # the same of filling with a mean, see `reconstruct`


@torch.no_grad()
def reconstruct(
    model: MAE, images: torch.Tensor, sample_ids: torch.Tensor, seed: int, statistics: Statistics = "original"
) -> Reconstruction:
    """Mask and reconstruct uint8[n, 3, h, w].

    The baseline fills masked patches with the mean of the image's visible pixels, per colour. A model trained
    on normalised patches does not know a patch's mean and variance: for the picture they are taken from the
    original, or, which tells it nothing of what is masked, as the means of those of the image's visible patches. Its
    error is in normalised space, and its baseline is each patch's own mean.
    """
    was_training = model.training
    model.eval()
    pixels = model.normalise(images)
    patches = model.patchify(pixels)
    noise = noise_of(model.config, seed, MASK_EPOCH, sample_ids)
    prediction, masked = model.predict(pixels, noise)
    target = model.target(patches)
    hidden = masked[..., None].expand_as(patches)
    error = (prediction - target)[hidden].square().mean().item()

    if model.config.norm_pix:
        baseline = torch.zeros_like(target)
        mean = patches.mean(dim=-1, keepdim=True)
        variance = patches.var(dim=-1, keepdim=True)
        if statistics == "visible":
            mean, variance = of_visible(mean, masked), of_visible(variance, masked)
        shown = prediction * (variance + 1e-6).sqrt() + mean
    else:
        colours = patches.unflatten(-1, (-1, 3))  # [n, L, p · p, 3]
        seen = (~masked)[..., None, None]
        mean = (colours * seen).sum(dim=(1, 2)) / (seen.sum(dim=(1, 2)) * colours.shape[2])  # [n, 3]
        baseline = mean[:, None, None, :].expand_as(colours).flatten(-2)
        shown = prediction
    baseline_error = (baseline - target)[hidden].square().mean().item()

    def to_pixels(patches: torch.Tensor) -> torch.Tensor:
        image = model.unpatchify(patches) * model.pixel_std + model.pixel_mean
        return (image * 255).round().clamp(0, 255).to(torch.uint8).cpu()

    originals = images.cpu()
    where = model.unpatchify(hidden.to(patches.dtype)).bool().cpu()
    model.train(was_training)
    return Reconstruction(
        originals=originals,
        masked=torch.where(where, torch.tensor(GREY, dtype=torch.uint8), originals),
        pasted=torch.where(where, to_pixels(shown), originals),
        error=error,
        baseline=baseline_error,
    )


def of_visible(values: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The mean of float[n, L, 1] over the patches that are not masked (bool[n, L]): float[n, 1, 1]."""
    seen = (~masked)[..., None].to(values.dtype)
    return (values * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)


def images_of_folder(store: Store, decoder: Decoder, count: int) -> torch.Tensor:
    """Centre crops of the first `count` images of a folder that can be read, by name; others are named in the log:
    uint8[n, 3, h, w]. UserError where there is none."""
    names = [name for name in store.names() if is_image(name)]
    if not names:
        raise UserError(f"{store.url}: there is no image (looked for {', '.join(IMAGE_EXTENSIONS)})")
    found: list[torch.Tensor] = []
    for name in names:
        if len(found) == count:
            break
        try:
            found.append(_centred(store.read(name), decoder))
        except ValueError as error:
            log.warning("%s is left out: %s", store.describe(name), error)
    if not found:
        raise UserError(f"{store.url}: none of {len(names)} images can be read")
    return torch.cat(found)


def _centred(data: bytes, decoder: Decoder) -> torch.Tensor:
    """The centre crop of an encoded image: uint8[1, 3, h, w]. ValueError, with the reason, where it cannot be read."""
    width, height = image_size(lambda size: data[:size], len(data))
    box = centre_crops(np.array([height]), np.array([width]), CENTRE, aspect_of(decoder))
    decoded = decoder([data], box, np.zeros(1, bool))
    if decoded.bad:
        raise ValueError(decoded.bad[0])
    return decoded.images


def spread_ids(dataset: Dataset, count: int) -> Ints:
    """Up to `count` sample ids spread evenly over a dataset: int64[n]."""
    return np.unique(np.linspace(0, dataset.samples - 1, min(count, dataset.samples)).astype(np.int64))


def evenly_spread(dataset: Dataset, decoder: Decoder, count: int) -> Batch:
    """Up to `count` samples spread evenly over a dataset, through their centre crops; bad ones are left out."""
    ids = spread_ids(dataset, count)
    batch = centred_batch(dataset, decoder, ids)
    good = batch.weights > 0
    if not good.any():
        raise UserError(
            f"{dataset.store.url}: none of {len(ids)} samples decodes; run `maestream shards verify`"
        )
    images, labels, sample_ids = batch.images[good], batch.labels[good], batch.sample_ids[good]
    return Batch(images, labels, sample_ids, batch.weights[good], {}, batch.spent)


def draw_grid(result: Reconstruction, columns: int = 2, rows: int = 6) -> bytes:
    """PNG of the first images, `columns` triples (original, masked, reconstruction) side by side."""
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
