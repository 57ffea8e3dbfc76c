"""`maestream import`, `export` and `reconstruct`: convert weights, and show what a model reconstructs."""

from typing import TYPE_CHECKING, Any

import click

from cluster.cli.options import image_size_option, step_option
from cluster.terminal.console import console, write_file
from pipeline.dataset.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from pipeline.text import plural
from trainer.weights.formats import FORMATS

if TYPE_CHECKING:
    import torch

    from trainer.config.model_schema import ModelConfig
    from trainer.weights.pretrained import PretrainedModel

HEADS = click.IntRange(min=1)


def weights_options(command: Any) -> Any:
    """Add options for what a weights file may not record."""
    for option in (
        click.option(
            "--targets",
            type=click.Choice(["pixels", "normalised"]),
            help="What the decoder predicts, if the weights do not record it: plain pixels, or pixels normalised per patch.  "
            "[default: pixels]",
        ),
        click.option(
            "--decoder-heads",
            type=HEADS,
            metavar="N",
            help="Number of attention heads of the decoder, if the weights do not record it.  [default: as in published models]",
        ),
        click.option(
            "--heads",
            type=HEADS,
            metavar="N",
            help="Number of attention heads of the encoder, if the weights do not record it.  [default: as in published models "
            "of the same width]",
        ),
    ):
        command = option(command)
    return command


def _read(
    location: str, heads: int | None, decoder_heads: int | None, targets: str | None, step: int | None = None
) -> "PretrainedModel":
    """Read a model and print what had to be assumed about it."""
    from trainer.weights.pretrained import read_pretrained

    hints = {"heads": heads, "decoder_heads": decoder_heads, "norm_pix": targets and targets == "normalised"}
    model = read_pretrained(location, step, {key: value for key, value in hints.items() if value is not None})
    for assumption in model.info.source.get("taken", []):
        console.print(assumption, style="yellow")
    return model


def _describe(pretrained: "PretrainedModel") -> str:
    from trainer.weights.state_dicts import model_kind

    model = pretrained.model
    height, width = model.size
    parameters = sum(tensor.numel() for tensor in pretrained.weights.values())
    return (
        f"{model_kind(model)} with {plural(model.depth, 'block')}, width {model.width}, {plural(model.heads, 'head')}, patch size "
        f"{model.patch_size}, image size {height} × {width}, {parameters:,} parameters"
    )


@click.command(name="import")
@click.argument("file")
@click.argument("out")
@image_size_option
@weights_options
def import_(file: str, out: str, size: tuple[int, int] | None, **hints: Any) -> None:
    """Convert published weights to a model folder.

    FILE is a file, a folder or a URL with weights of the MAE authors, of transformers (ViTMAE, ViT) or of timm (ViT). All
    commands that take a run accept the folder OUT, too.
    """
    from trainer.weights.export import save_native
    from trainer.weights.resize import resize_model

    pretrained = _read(file, **hints)
    if size:
        pretrained = resize_model(pretrained, size)
    save_native(pretrained, open_store(out))
    console.print(f"imported to {out}: {_describe(pretrained)}")


@click.command()
@click.argument("run")
@click.argument("out")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), required=True, help="Format to write, see above."
)
@click.option("--encoder", is_flag=True, help="Export the encoder only, without the decoder or the head.")
@step_option
def export(run: str, out: str, form: str, encoder: bool, step: int | None) -> None:
    """Export a run's weights, with a model card.

    RUN is a run, or an imported model. OUT is a new folder. Formats:

    \b
      safetensors   maestream's own; all commands accept it like a run
      transformers  ViTMAEForPreTraining, ViTModel or ViTForImageClassification
      timm          VisionTransformer, without a decoder
      authors       model.pth for the MAE authors' code
      onnx          model.onnx: images to tokens or logits, without a decoder
      torch-export  model.pt2 for torch.export.load, otherwise like onnx
    """
    from trainer.weights.export import export
    from trainer.weights.pretrained import read_pretrained

    pretrained = read_pretrained(run, step)
    export(pretrained, form, open_store(out), encoder)
    console.print(f"exported {pretrained.info.label} to {out}")


def _parse_bands(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--bands {text}: expected numbers of bands, for example 3,2,1") from None


@click.command()
@click.argument("run")
@click.option("--data", metavar="DATASET", help="Dataset with the images; better not the one trained on.")
@click.option("--images", metavar="FOLDER", help="Folder with the images, instead of --data.")
@click.option(
    "--grid", required=True, type=click.Path(dir_okay=False, writable=True), help="PNG file to write."
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="N",
    default=64,
    show_default=True,
    help="Number of images to measure the error on.",
)
@click.option(
    "--statistics",
    type=click.Choice(["original", "visible"]),
    default="original",
    show_default=True,
    help="How to draw a model's normalised patches: with the mean and variance of each original patch, or with those of the "
    "visible patches.",
)
@click.option(
    "--bands",
    metavar="R,G,B",
    callback=lambda context, option, text: _parse_bands(text),
    help="Bands of the images to draw as red, green and blue, or one band to draw in grey, counted from 1.  [default: 1,2,3, or "
    "1 for images with fewer]",
)
@step_option
@weights_options
def reconstruct(
    run: str,
    data: str | None,
    images: str | None,
    grid: str,
    count: int,
    statistics: Any,
    bands: tuple[int, ...] | None,
    **options: Any,
) -> None:
    """Draw what a model reconstructs of masked images.

    Writes a PNG with original, masked and reconstructed images, and prints the error over masked patches. RUN is a run, or a
    file, folder or URL with the weights of an MAE.
    """
    from pipeline.pictures.bands import picture_bands
    from trainer.config.device import best_device
    from trainer.config.model_schema import ModelConfig
    from trainer.evaluate.reconstruct import draw_grid, reconstruct
    from trainer.models.mae import MAE
    from trainer.models.pixels import describe_normalisation

    if (data is None) == (images is None):
        raise UserError("give either --data DATASET or --images FOLDER")
    pretrained = _read(run, **options)
    config, info = pretrained.model, pretrained.info
    if not isinstance(config, ModelConfig):
        what = f"a run of `maestream {info.run.task}`" if info.run else "weights without a decoder"
        raise UserError(f"{info.location} cannot reconstruct images: it is {what}")
    picture_bands(config.channels, bands)  # raises UserError before the images are read
    console.print(describe_normalisation(config))
    model = MAE(config)
    model.load_state_dict(pretrained.weights)
    device = best_device()
    pixels, ids = _load_images(data, images, count, config)
    seed = info.run.seed if info.run else 0
    result = reconstruct(model.to(device), pixels.to(device), ids.to(device), seed, statistics, bands)
    write_file(grid, draw_grid(result))
    kind, fill = "patches", "the mean of the visible pixels"
    if config.norm_pix:
        kind, fill = "normalised patches", "each patch's own mean"
    console.print(
        f"{info.label}: error over masked {kind} {result.error:.4f} ({plural(len(ids), 'image')}), "
        f"{result.error / result.baseline:.0%} of the error of filling them with {fill} ({result.baseline:.4f}); wrote {grid}"
    )


def _load_images(
    data: str | None, images: str | None, count: int, model: "ModelConfig"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return images of a dataset or a folder, pixels [n, c, height, width], and the ids that seed their masks, int64[n]."""
    import torch

    from pipeline.decode.factory import make_decoder
    from trainer.evaluate.reconstruct import load_evenly_spaced, read_image_folder
    from trainer.models.pixels import check_pixels, images_taken

    if data is not None:
        dataset = open_dataset(data)
        check_pixels(model, dataset)
        decoder = make_decoder("auto", model.size, 4, pixels=images_taken(model, dataset.manifest.pixels))
        batch = load_evenly_spaced(dataset, decoder, count)
        return batch.images, batch.sample_ids
    assert images is not None
    decoder = make_decoder("auto", model.size, 4, pixels=model.pixels)
    pixels = read_image_folder(open_store(images), decoder, count)
    return pixels, torch.arange(len(pixels))
