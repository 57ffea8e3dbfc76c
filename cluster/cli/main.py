"""The `maestream` command with all of its subcommands."""

import sys

import click

from cluster.cli.bench.end_to_end import end_to_end
from cluster.cli.bench.loader import loader
from cluster.cli.bench.step import step
from cluster.cli.checkpoints import checkpoints
from cluster.cli.doctor import doctor
from cluster.cli.evaluate import evaluate, features, knn
from cluster.cli.manifests import manifests
from cluster.cli.order import order
from cluster.cli.report import report
from cluster.cli.shards.group import shards
from cluster.cli.study import study
from cluster.cli.submit import submit
from cluster.cli.train import finetune, linprobe, pretrain
from cluster.cli.weights import export, import_, reconstruct
from pipeline.errors import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="maestream")
def cli() -> None:
    """Pre-train Masked Autoencoders (MAE) from WebDataset shards in a local folder or a bucket, and evaluate them.

    Datasets, runs and output files may be local paths or URLs: s3://bucket/prefix, gs://, az://, or, to read, hf://datasets/USER/NAME.
    The S3 endpoint and keys come from the usual AWS variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …).
    """


@cli.group()
def bench() -> None:
    """Measure the speed of the loader and of the training step."""


def main() -> None:
    """Run the command line. A UserError is printed as one line, with exit code 2; Ctrl-C exits with 130."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption) and (hint := _suggest_override(error)):
            error = click.UsageError(f"{error.message} {hint}", error.ctx)
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"maestream: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("maestream: interrupted", err=True)
        sys.exit(130)


def _suggest_override(error: click.NoSuchOption) -> str:
    """Return a hint if the unknown option is a recipe key of a command that takes key=value arguments, else ""."""
    from trainer.config.recipe import CONFIG_TYPES

    option, key = error.option_name, error.option_name.lstrip("-").replace("-", "_")
    parameters = error.ctx.command.params if error.ctx else []
    keys = {name for config_type in CONFIG_TYPES.values() for name in config_type.model_fields}
    if key.partition(".")[0] not in keys or all(p.name != "overrides" for p in parameters):
        return ""
    following = dict(zip(sys.argv, sys.argv[1:], strict=False))  # the next word of each word
    values = [word.partition("=")[2] for word in sys.argv if word.startswith(f"{option}=")]
    value = values[0] if values else following.get(option, "VALUE")
    return f"Did you mean {key}={value}? (recipe keys have no dashes)"


for benchmark in (loader, step, end_to_end):
    bench.add_command(benchmark)
for command in (
    checkpoints, doctor, evaluate, export, features, finetune, import_, knn, linprobe, manifests, order, pretrain,
    reconstruct, report, shards, study, submit,
):  # fmt: skip
    cli.add_command(command)
