"""What people type."""

import json
import sys
from typing import Any

import click
from rich.table import Table

from cluster.bench import bench
from cluster.terminal import console, progress_bar, write_file
from pipeline.errors import UserError
from pipeline.manifest import open_dataset

NO_CHECKSUMS = (
    "only headers were read, so flipped bytes of an image will not be noticed unless it no longer decodes: "
    "`maestream shards index --checksums --overwrite` adds checksums"
)
SEED = click.IntRange(min=0, max=2**31 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="maestream")
def cli() -> None:
    """Pre-train Masked Autoencoders straight from WebDataset shards in a folder or a bucket.

    Every path may be s3://bucket/prefix; endpoint and keys come from the usual AWS variables.
    """


def main() -> None:
    """The console command. What only a person can mend is one message and exit code 2."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"maestream: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("maestream: interrupted", err=True)
        sys.exit(130)


cli.add_command(bench)


@cli.group()
def shards() -> None:
    """Build, look at and verify sharded datasets."""


@shards.command()
@click.argument("source")
@click.argument("dest")
@click.option(
    "--shard-mb", type=click.FloatRange(min=0.01), default=128, show_default=True, help="Size of a shard."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the shuffle.")
@click.option("--strict", is_flag=True, help="Stop at the first image that does not decode.")
@click.option("--overwrite", is_flag=True, help="Replace the dataset that is there.")
def build(source: str, dest: str, shard_mb: float, seed: int, strict: bool, overwrite: bool) -> None:
    """Turn images into a dataset of WebDataset shards.

    SOURCE is a folder of class folders or of images, or synthetic:?count=4096&classes=10&seed=0. The images'
    bytes are not touched; each is decoded once to see that it can be.
    """
    from pipeline.shards import build
    from pipeline.sources import open_source
    from pipeline.storage import open_store

    opened = open_source(source)
    with progress_bar() as progress:
        task = progress.add_task("images", total=len(opened.items))
        built = build(
            opened,
            open_store(dest),
            shard_bytes=int(shard_mb * 2**20),
            seed=seed,
            strict=strict,
            overwrite=overwrite,
            on_image=lambda: progress.advance(task),
        )
    for line in built.left_out:
        console.print(f"left out {line}", style="yellow")
    manifest = built.manifest
    console.print(
        f"{manifest.samples:,} images in {manifest.shards} shards, {manifest.image_bytes / 2**20:,.1f} MiB, "
        f"{len(manifest.classes)} classes, {len(built.left_out)} left out → {dest}"
    )


@shards.command()
@click.argument("dest")
@click.option("--to", metavar="ELSEWHERE", help="Where indexes and manifest go, if not beside the tars.")
@click.option("--checksums", is_flag=True, help="Read every byte, so that flipped ones are noticed later.")
@click.option("--skip-damaged", is_flag=True, help="Leave damaged samples out, and name them.")
@click.option("--overwrite", is_flag=True, help="Replace the indexes and manifest that are there.")
def index(dest: str, to: str | None, checksums: bool, skip_damaged: bool, overwrite: bool) -> None:
    """Make a dataset of the WebDataset tars that lie in DEST.

    Only headers are read (and every byte with --checksums), and no tar is written to. Images are .jpg, .jpeg,
    .png and .webp; labels are .cls, or "label", "cls" or "class" in .json.
    """
    from PIL import features

    from pipeline.foreign import find_shards, index_shards
    from pipeline.storage import open_store

    store = open_store(dest)
    names = find_shards(store)
    with progress_bar() as progress:
        task = progress.add_task("shards", total=len(names))
        found = index_shards(
            store,
            names,
            open_store(to or dest),
            checksums=checksums,
            skip_damaged=skip_damaged,
            overwrite=overwrite,
            on_shard=lambda: progress.advance(task),
        )
    for line in found.left_out.named:
        console.print(f"left out {line}", style="yellow")
    if found.left_out.count > len(found.left_out.named):
        console.print(f"… and {found.left_out.count - len(found.left_out.named):,} more", style="yellow")
    if found.webp and not features.check("webp"):
        console.print(f"{found.webp:,} images are WebP, which Pillow here cannot decode", style="yellow")
    manifest = found.manifest
    console.print(
        f"{manifest.samples:,} images in {manifest.shards} shards, {manifest.image_bytes / 2**20:,.1f} MiB, "
        f"{len(manifest.classes)} classes, {found.left_out.count:,} left out, {found.without_label:,} without a "
        f"label → {to or dest}"
    )
    if found.without_image or found.other_files:
        console.print(
            f"passed over: {found.without_image:,} samples without an image, {found.other_files:,} other files"
        )
    if not checksums:
        console.print(NO_CHECKSUMS)


@shards.command()
@click.argument("dest")
@click.option("--grid", type=click.Path(dir_okay=False, writable=True), help="Write a contact sheet (PNG).")
def show(dest: str, grid: str | None) -> None:
    """Counts, sizes, classes, and a contact sheet of a dataset."""
    dataset = open_dataset(dest)
    manifest = dataset.manifest
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    sizes = dataset.shard_bytes / 2**20
    rows = {
        "dataset": dataset.store.url,
        "fingerprint": manifest.fingerprint,
        "samples": f"{manifest.samples:,}",
        "shards": f"{manifest.shards:,}, {sizes.min():.1f} to {sizes.max():.1f} MiB",
        "images": f"{manifest.image_bytes / 2**20:,.1f} MiB, {dataset.mean_sample_bytes / 1000:.1f} kB on average",
        "classes": f"{len(manifest.classes)}: {_shorten(manifest.classes)}" if manifest.classes else "none",
        **({"tars": manifest.shards_url} if manifest.shards_url else {}),
        "built": ", ".join(f"{key} {value}" for key, value in manifest.built.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if not manifest.checksums:
        console.print(NO_CHECKSUMS)
    if grid:
        from pipeline.contact_sheet import draw_contact_sheet

        write_file(grid, draw_contact_sheet(dataset))
        console.print(f"contact sheet → {grid}")


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


@shards.command()
@click.argument("dest")
def verify(dest: str) -> None:
    """Read every byte and decode every image. Exit code 1, and what is damaged, if anything is."""
    from pipeline.shards import verify

    dataset = open_dataset(dest)
    with progress_bar() as progress:
        task = progress.add_task("shards", total=dataset.manifest.shards)
        problems = verify(dataset, on_shard=lambda: progress.advance(task))
    for problem in problems:
        console.print(f"damaged {problem}", style="red")
    if problems:
        console.print(f"{len(problems)} problems in {dataset.store.url}")
        sys.exit(1)
    console.print(
        f"{dataset.samples:,} images in {dataset.manifest.shards} shards "
        f"{'are whole' if dataset.manifest.checksums else 'decode'}: {dataset.store.url}"
    )
    if not dataset.manifest.checksums:
        console.print(f"their bytes could not be checked: {NO_CHECKSUMS}")


@cli.command()
@click.argument("dest")
@click.option("--global-batch", type=click.IntRange(min=1), required=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--world-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--steps", help="Steps of the epoch, from:to; all without it.")
@click.option("--lanes", type=click.IntRange(min=1), help="V; without it as a run would fix it.")
@click.option("--block", type=click.IntRange(min=1), help="K; without it as a run would fix it.")
def order(dest: str, steps: str | None, rank: int, world_size: int, epoch: int, **fixed: Any) -> None:
    """Which samples a worker sees, as JSON lines, one a step: ids, keys, crops (y, x, h, w), flips."""
    from pipeline.augment import random_flips, random_resized_crops
    from trainer.config import DataConfig, PretrainConfig, WorkersConfig
    from trainer.run import fix_order, make_order

    if rank >= world_size:
        raise UserError(f"--rank {rank} of --world-size {world_size}: ranks go from 0 to {world_size - 1}")
    dataset = open_dataset(dest)
    data = DataConfig(lanes=fixed["lanes"], block=fixed["block"])
    config = PretrainConfig(
        global_batch=fixed["global_batch"],
        seed=fixed["seed"],
        workers=WorkersConfig(max=world_size),
        data=data,
    )
    order = make_order(fix_order(config, dataset), dataset)
    for step in _steps(steps, order.steps_per_epoch):
        ids = order.step_ids(epoch * order.steps_per_epoch + step, rank, world_size)
        located = dataset.locate(ids)
        crops = random_resized_crops(order.seed, epoch, ids, located.height, located.width)
        line = {
            "step": step,
            "sample_ids": ids.tolist(),
            "keys": dataset.keys(ids),
            "crops": crops.tolist(),
            "flips": random_flips(order.seed, epoch, ids).tolist(),
        }
        click.echo(json.dumps(line))


def _steps(text: str | None, steps_per_epoch: int) -> range:
    if text is None:
        return range(steps_per_epoch)
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise UserError(f"--steps {text}: write from:to, 0:10 say")
    if int(last) > steps_per_epoch:
        raise UserError(f"--steps {text}: an epoch has {steps_per_epoch} steps")
    return range(int(first), int(last))


@cli.command()
@click.option(
    "--config", "recipe", required=True, type=click.Path(dir_okay=False), help="A recipe, recipes/*.yaml."
)
@click.option("--data", required=True, help="The dataset.")
@click.option("--out", required=True, help="The run folder; the same command again resumes.")
@click.option("--ledger", is_flag=True, help="Metrics name the samples of each step.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def pretrain(recipe: str, data: str, out: str, ledger: bool, overrides: tuple[str, ...]) -> None:
    """Pre-train an MAE, or resume it."""
    from trainer.config import PretrainConfig, load_config

    config = load_config(PretrainConfig, recipe, overrides)
    from cluster.train import train

    train(config, data, out, console, ledger)
    console.print(f"done: {out}")


@cli.command()
@click.argument("run")
@click.option("--data", required=True, help="The dataset to look at; held-out images tell more.")
@click.option(
    "--grid", required=True, type=click.Path(dir_okay=False, writable=True), help="Where to write the PNG."
)
@click.option(
    "--count", type=click.IntRange(min=1), default=64, show_default=True, help="Images the error is over."
)
def reconstruct(run: str, data: str, grid: str, count: int) -> None:
    """A picture of original, masked and reconstructed images by a run's newest checkpoint, and its error."""
    import torch

    from pipeline.decode import make_decoder
    from pipeline.storage import open_store
    from trainer.checkpoint import committed_steps, load_weights
    from trainer.mae import MAE
    from trainer.reconstruct import draw_grid, evenly_spread, reconstruct
    from trainer.run import read_config

    store = open_store(run)
    config = read_config(store)
    steps = committed_steps(store)
    if not steps:
        raise UserError(f"{store.url} has no committed checkpoint yet: let it train on")
    dataset = open_dataset(data)
    model = MAE(config.model)
    load_weights(store, steps[-1], model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = evenly_spread(dataset, make_decoder("auto", config.model.image_size, 4), count)
    result = reconstruct(model.to(device), batch.images.to(device), batch.sample_ids.to(device), config.seed)
    write_file(grid, draw_grid(result))
    kind, baseline = "patches", "the mean of the visible pixels"
    if config.model.norm_pix:
        kind, baseline = "normalised patches", "each patch's own mean"
    console.print(
        f"step {steps[-1]}: error over masked {kind} {result.error:.4f} ({len(batch.images)} images); filling with "
        f"{baseline} gives {result.baseline:.4f}, so {result.error / result.baseline:.0%} of it → {grid}"
    )
