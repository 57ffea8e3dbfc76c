"""`maestream manifests`: what brings a run to a cluster."""

import re
import shlex
from collections.abc import Callable
from typing import Any

import click

from cluster.options import keys_of, trains
from cluster.terminal import console, write_file
from pipeline.errors import UserError

TASKS = ("pretrain", "finetune", "linprobe")
NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")  # of a Kubernetes object
ZONES = re.compile(r"([a-z]+(?:-[a-z]+)+-\d)[a-z](,\1[a-z])*")


@click.group()
def manifests() -> None:
    """What brings a run to a cluster, from the same words as the run itself."""


def describes(command: Callable[..., None]) -> Callable[..., None]:
    """The options of both."""
    for option in reversed(
        (
            trains,
            click.option("--task", type=click.Choice(TASKS), default="pretrain", show_default=True),
            click.option("--init", help="The run whose encoder it begins with; or scratch."),
            click.option("--val", help="A dataset with the same classes, to be evaluated on."),
            click.option("--image", required=True, help="The container image, with its tag."),
            click.option(
                "--gpus",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="GPUs of a machine, with a worker each.",
            ),
            click.option("--to", help="Write it there, not to the terminal."),
        )
    ):
        command = option(command)
    return command


@manifests.command()
@describes
@click.option("--service-account", help="Whose rights the pods have in the cloud.")
@click.option("--secret", help="A Secret whose keys are the usual AWS variables.")
def kuberay(service_account: str | None, secret: str | None, **how: Any) -> None:
    """A KubeRay RayJob with an elastic group of workers on spot machines."""
    for option, name in (("--service-account", service_account), ("--secret", secret)):
        if name is not None and not NAME.fullmatch(name):
            raise UserError(f"{option} {name}: that is no name of a Kubernetes object")
    _render("kuberay", how, service_account=service_account, secret=secret)


@manifests.command()
@describes
@click.option("--machine", required=True, help="The workers' EC2 instance type, g6e.4xlarge say.")
@click.option(
    "--zone", required=True, help="Availability zone, us-east-1a say; or several: us-east-1a,us-east-1b."
)
@click.option("--instance-profile", required=True, help="Whose rights the machines have.")
def aws(machine: str, zone: str, instance_profile: str, **how: Any) -> None:
    """A YAML for Ray's cluster launcher, with workers on spot machines."""
    zones = ZONES.fullmatch(zone)
    if not zones:
        raise UserError(f"--zone {zone}: write us-east-1a, or several of a region: us-east-1a,us-east-1b")
    for option, name in (("--machine", machine), ("--instance-profile", instance_profile)):
        if not re.fullmatch(r"[\w+=,.@-]+", name):
            raise UserError(f"{option} {name}: that is no name on AWS")
    _render("aws", how, machine=machine, zones=zone, region=zones[1], instance_profile=instance_profile)


def _render(target: str, how: dict[str, Any], **more: str | None) -> None:
    from cluster.render import manifest, refuse_secrets
    from trainer.recipe import KINDS, load_config

    task, recipe, overrides, init, val, image, to = (
        how.pop(name) for name in ("task", "recipe", "overrides", "init", "val", "image", "to")
    )
    # Before anything says what it does not understand of them.
    refuse_secrets(" ".join((how["data"], how["out"], init or "", val or "", image, *overrides)))
    if shlex.quote(image) != image:
        raise UserError(f"--image {image}: that is no name of an image")
    config = load_config(KINDS[task], recipe, overrides, keys_of(init, val))
    text = manifest(target, config, image=image, file=to, more=more, **how)
    if to:
        write_file(to, text.encode())
        console.print(f"→ {to}")
    else:
        click.echo(text, nl=False)
