"""`maestream manifests`: generate the files that start a run on Kubernetes or AWS."""

import re
import shlex
from collections.abc import Callable
from typing import Any

import click

from cluster.cli.options import OVERRIDES, training_options
from cluster.terminal.console import console, write_file
from pipeline.errors import UserError

TASKS = ("pretrain", "finetune", "linprobe")
NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")  # of a Kubernetes object
ZONES = re.compile(r"([a-z]+(?:-[a-z]+)+-\d)[a-z](,\1[a-z])*")


@click.group()
def manifests() -> None:
    """Generate files that start a run on Kubernetes or AWS.

    They take the options of the run itself (pretrain, finetune or linprobe) and those of the machines.
    """


def manifest_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of both targets."""
    for option in reversed(
        (
            training_options,
            click.option(
                "--task",
                type=click.Choice(TASKS),
                default="pretrain",
                show_default=True,
                help="Command to run.",
            ),
            click.option("--init", metavar="WEIGHTS", help="As in the command to run."),
            click.option("--val", metavar="DATASET", help="As in the command to run."),
            click.option("--image", required=True, help="Container image, with its tag."),
            click.option(
                "--gpus",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                metavar="N",
                help="GPUs per machine; each gets a worker.",
            ),
            click.option("--to", metavar="FILE", help="Write to this file.  [default: standard output]"),
        )
    ):
        command = option(command)
    return command


@manifests.command(epilog=OVERRIDES)
@manifest_options
@click.option(
    "--service-account",
    metavar="NAME",
    help="Kubernetes service account of the pods, which grants access to the bucket.",
)
@click.option(
    "--secret", metavar="NAME", help="Kubernetes Secret with the AWS variables (AWS_ACCESS_KEY_ID, …)."
)
def kuberay(service_account: str | None, secret: str | None, **options: Any) -> None:
    """Generate a KubeRay RayJob.

    Its workers are an elastic group that may run on spot machines.
    """
    for option, name in (("--service-account", service_account), ("--secret", secret)):
        if name is not None and not NAME.fullmatch(name):
            raise UserError(f"{option} {name}: not a valid name of a Kubernetes object")
    _render("kuberay", options, service_account=service_account, secret=secret)


@manifests.command(epilog=OVERRIDES)
@manifest_options
@click.option(
    "--machine",
    required=True,
    metavar="TYPE",
    help="EC2 instance type of the workers, for example g6e.4xlarge.",
)
@click.option(
    "--zone",
    required=True,
    metavar="ZONES",
    help="Availability zone, or several of one region separated by commas: us-east-1a,us-east-1b.",
)
@click.option(
    "--instance-profile",
    required=True,
    metavar="NAME",
    help="IAM instance profile of the machines, which grants access to the bucket.",
)
def aws(machine: str, zone: str, instance_profile: str, **options: Any) -> None:
    """Generate a config of Ray's cluster launcher.

    The workers run on EC2 spot machines.
    """
    zones = ZONES.fullmatch(zone)
    if not zones:
        raise UserError(
            f"--zone {zone}: expected a zone such as us-east-1a, or several of one region: us-east-1a,us-east-1b"
        )
    for option, name in (("--machine", machine), ("--instance-profile", instance_profile)):
        if not re.fullmatch(r"[\w+=,.@-]+", name):
            raise UserError(f"{option} {name}: not a valid AWS name")
    _render("aws", options, machine=machine, zones=zone, region=zones[1], instance_profile=instance_profile)


def _render(target: str, options: dict[str, Any], **more: str | None) -> None:
    from cluster.deploy.render import check_no_secrets, render_manifest
    from trainer.config.recipe import CONFIG_TYPES, keys_from_options, load_config

    task, recipe, overrides, init, val, image, to = (
        options.pop(name) for name in ("task", "recipe", "overrides", "init", "val", "image", "to")
    )
    # First of all: no later error message may contain a secret.
    check_no_secrets(" ".join((options["data"], options["out"], init or "", val or "", image, *overrides)))
    if shlex.quote(image) != image:
        raise UserError(f"--image {image}: not a valid image name")
    config = load_config(CONFIG_TYPES[task], recipe, overrides, keys_from_options(init, val))
    text = render_manifest(target, config, image=image, file=to, extra=more, **options)
    if to:
        write_file(to, text.encode())
        console.print(f"wrote {to}")
    else:
        click.echo(text, nl=False)
