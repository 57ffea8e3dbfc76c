"""Weights in, weights out: `maestream import`, `export` and `reconstruct`."""

from typing import TYPE_CHECKING, Any

import click

from cluster.judge import of_size, of_step
from cluster.terminal import console, write_file
from pipeline.errors import UserError
from pipeline.manifest import open_dataset
from pipeline.storage import open_store
from trainer.formats import FORMATS

if TYPE_CHECKING:
    import torch

    from pipeline.decode import Decoder
    from trainer.pretrained import Pretrained

HEADS = click.IntRange(min=1)


def tells(command: Any) -> Any:
    """What a file of weights may leave open."""
    for option in (
        click.option(
            "--targets",
            type=click.Choice(["pixels", "normalised"]),
            help="What its decoder predicts, where the file does not say.  [default: pixels]",
        ),
        click.option("--decoder-heads", type=HEADS, help="Likewise; of published models it is known."),
        click.option(
            "--heads", type=HEADS, help="Where neither the file nor a published model of its width says."
        ),
    ):
        command = option(command)
    return command


def _read(
    place: str, heads: int | None, decoder_heads: int | None, targets: str | None, step: int | None = None
) -> "Pretrained":
    from trainer.pretrained import read_pretrained

    told = {"heads": heads, "decoder_heads": decoder_heads, "norm_pix": targets and targets == "normalised"}
    found = read_pretrained(place, step, {key: value for key, value in told.items() if value is not None})
    for taken in found.about.source.get("taken", []):
        console.print(taken, style="yellow")
    return found


def _what(found: "Pretrained") -> str:
    from trainer.layouts import kind_of

    model = found.model
    height, width = model.size
    numbers = sum(tensor.numel() for tensor in found.weights.values())
    return (
        f"{kind_of(model)} of {model.depth} blocks, width {model.width}, {model.heads} heads, patches of {model.patch_size}, "
        f"images of {height} × {width}: {numbers:,} numbers"
    )


@click.command(name="import")
@click.argument("file")
@click.argument("out")
@of_size
@tells
def import_(file: str, out: str, size: tuple[int, int] | None, **told: Any) -> None:
    """Weights of others, from a file, a folder or a URL, into a folder that all commands take like a run.

    The MAE authors' checkpoints, ViTMAE and ViT of transformers, and timm's ViTs are known by their keys."""
    from trainer.export import imported
    from trainer.pretrained import resized

    found = _read(file, **told)
    if size:
        found = resized(found, size)
    imported(found, open_store(out))
    console.print(f"{_what(found)} → {out}")


@click.command()
@click.argument("run")
@click.argument("out")
@click.option("--format", "form", type=click.Choice(FORMATS), required=True, help="Who is to read it.")
@click.option(
    "--encoder", is_flag=True, help="Without decoder, or head.  [timm, onnx and torch-export have no decoder]"
)
@of_step
def export(run: str, out: str, form: str, encoder: bool, step: int | None) -> None:
    """A run's weights for others, with a model card; OUT is a new folder."""
    from trainer.export import export
    from trainer.pretrained import read_pretrained

    found = read_pretrained(run, step)
    export(found, form, open_store(out), encoder)
    console.print(f"{found.about.said} → {out}")


@click.command()
@click.argument("run")
@click.option("--data", help="The dataset to look at; held-out images tell more.")
@click.option("--images", help="Or a folder of images.")
@click.option(
    "--grid", required=True, type=click.Path(dir_okay=False, writable=True), help="Where to write the PNG."
)
@click.option(
    "--count", type=click.IntRange(min=1), default=64, show_default=True, help="Images the error is over."
)
@click.option(
    "--statistics",
    type=click.Choice(["original", "visible"]),
    default="original",
    show_default=True,
    help="Mean and variance of normalised patches: each patch's own, or those of the visible ones.",
)
@of_step
@tells
def reconstruct(
    run: str, data: str | None, images: str | None, grid: str, count: int, statistics: Any, **how: Any
) -> None:
    """A picture of original, masked and reconstructed images by a run's newest checkpoint, or by others' weights (a file, a
    folder or a URL), and its error."""
    from pipeline.decode import make_decoder
    from trainer.config import ModelConfig
    from trainer.device import best_device
    from trainer.mae import MAE
    from trainer.reconstruct import draw_grid, reconstruct

    if (data is None) == (images is None):
        raise UserError("what is to be looked at? --data DATASET, or --images FOLDER")
    found = _read(run, **how)
    config, about = found.model, found.about
    if not isinstance(config, ModelConfig):
        what = f"a run of `maestream {about.run.task}`" if about.run else "weights without a decoder"
        raise UserError(f"{about.where} is {what}, which reconstructs nothing")
    model = MAE(config)
    model.load_state_dict(found.weights)
    device = best_device()
    looked_at, ids = _looked_at(data, images, make_decoder("auto", config.size, 4), count)
    seed = about.run.seed if about.run else 0
    result = reconstruct(model.to(device), looked_at.to(device), ids.to(device), seed, statistics)
    write_file(grid, draw_grid(result))
    kind, baseline = "patches", "the mean of the visible pixels"
    if config.norm_pix:
        kind, baseline = "normalised patches", "each patch's own mean"
    console.print(
        f"{about.said}: error over masked {kind} {result.error:.4f} ({len(ids)} images); filling with "
        f"{baseline} gives {result.baseline:.4f}, so {result.error / result.baseline:.0%} of it → {grid}"
    )


def _looked_at(
    data: str | None, images: str | None, decoder: "Decoder", count: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Images of a dataset or a folder, uint8[n, 3, h, w], and by which ids they are masked, int64[n]."""
    import torch

    from trainer.reconstruct import evenly_spread, images_of_folder

    if data is not None:
        batch = evenly_spread(open_dataset(data), decoder, count)
        return batch.images, batch.sample_ids
    assert images is not None
    found = images_of_folder(open_store(images), decoder, count)
    return found, torch.arange(len(found))
