"""`maestream submit`: run a command as a job of a Ray cluster."""

import sys
from pathlib import Path

import click

from cluster.deploy.submit import (
    NO_SECRETS,
    check_command,
    connect,
    entrypoint,
    first_line,
    follow,
    retry_until_ready,
    staged,
)
from cluster.terminal.console import console
from pipeline.errors import UserError
from pipeline.secrets import has_secret, names_secret


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    show_envvar=True,
    metavar="URL",
    help="Address of the cluster's job server, for example http://head:8265.",
)
@click.option("--name", help="Name of the job.  [default: generated]")
@click.option(
    "--env",
    "environment",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set an environment variable of the job; may be repeated. Secrets are refused.",
)
@click.option(
    "--retry",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="How often to start the command again after a crash.",
)
@click.option("--wait", is_flag=True, help="Show the log until the job ends, and exit with its exit code.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(
    address: str,
    name: str | None,
    environment: tuple[str, ...],
    retry: int,
    wait: bool,
    command: tuple[str, ...],
) -> None:
    """Run a maestream command as a job of a Ray cluster.

    Example: maestream submit --address http://head:8265 -- pretrain --config …

    The files of the current folder are sent to the cluster, except those that git ignores (100 MB at most). The job keeps
    running when this terminal is closed.
    """
    variables = dict(map(_variable, environment))
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)
    check_command(root, command)
    with staged(Path.cwd()) as tree:
        client = connect(address)
        try:
            job = retry_until_ready(
                client.submit_job,
                entrypoint=entrypoint(command, retry),
                submission_id=name,
                runtime_env={"working_dir": str(tree), "env_vars": variables},
            )
        except (RuntimeError, ValueError, OSError) as error:
            if name and "already" in str(error):
                raise UserError(f"--name {name}: the cluster already has a job of this name") from None
            raise UserError(f"{address} rejected the job: {first_line(error)}") from None
    console.print(f"submitted job {job} to {address}: it keeps running when this terminal is closed")
    console.print(f"  ray job logs --follow {job} --address {address}")
    console.print(f"  ray job stop {job} --address {address}    (the workers save a checkpoint first)")
    if wait:
        sys.exit(follow(client, job))


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--env {name}: expected NAME=VALUE")
    if names_secret(name) or has_secret(value):
        raise UserError(f"--env {name}: {NO_SECRETS}")
    return name, value
