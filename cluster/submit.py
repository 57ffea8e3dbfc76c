"""`maestream submit`: a command of ours as a job of a Ray cluster, where it goes on when this terminal is closed."""

import asyncio
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import click
from tenacity import (
    Retrying,
    retry_if_exception_message,
    retry_if_result,
    stop_after_delay,
    wait_fixed,
    wait_random_exponential,
)

from cluster.places import OPTIONS, places_in
from cluster.terminal import console
from pipeline.errors import UserError
from pipeline.secrets import has_secret, names_secret

MOST_BYTES = 100 << 20  # of the working tree; Ray takes 512 MiB
PATIENCE_S = 5.0  # until the log is asked for again, when the connection is lost
TIMEOUT_S = 10.0  # of a question to the job server
SAFE = (
    "secrets do not belong in a job, whose description anybody on the cluster can read: give the machines a role, "
    "or mount a secret in them"
)
STOPPED = 130  # exit code


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--address", envvar="RAY_API_SERVER_ADDRESS", required=True, help="Of the job server: http://head:8265."
)
@click.option("--name", help="Of the job; one is made up without it.")
@click.option(
    "--env", "environment", multiple=True, metavar="NAME=VALUE", help="A variable of the job; no secrets."
)
@click.option(
    "--retry",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Starts after a crash, on the cluster.",
)
@click.option("--wait", is_flag=True, help="Show its log until it ends; exit as it does.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(
    address: str,
    name: str | None,
    environment: tuple[str, ...],
    retry: int,
    wait: bool,
    command: tuple[str, ...],
) -> None:
    """Run a command as a job of a Ray cluster: maestream submit --address http://head:8265 -- pretrain --config …

    The working tree goes along: what git knows, or does not ignore, of this folder.
    """
    variables = dict(map(_variable, environment))
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)
    check_command(root, command)
    client = _connect(address)
    with staged(Path.cwd()) as tree:
        try:
            job = _once_it_can(
                client.submit_job,
                entrypoint=entrypoint(command, retry),
                submission_id=name,
                runtime_env={"working_dir": str(tree), "env_vars": variables},
            )
        except (RuntimeError, ValueError, OSError) as error:
            if name and "already" in str(error):
                raise UserError(f"--name {name}: the cluster has such a job already") from None
            raise UserError(f"{address} does not take the job: {_first_line(error)}") from None
    console.print(f"job {job} → {address}: it goes on when this terminal is closed")
    console.print(f"  ray job logs --follow {job} --address {address}")
    console.print(f"  ray job stop {job} --address {address}    the workers save their work first")
    if wait:
        sys.exit(follow(client, job))


# A cluster that has just started says so.
_once_it_can = Retrying(
    retry=retry_if_exception_message(match=r"(?s).*try again later"),
    stop=stop_after_delay(60),
    wait=wait_random_exponential(max=5),
    reraise=True,
)

_until_it_ends = Retrying(
    retry=retry_if_result(lambda info: info is None or not info.status.is_terminal()),
    wait=wait_fixed(PATIENCE_S),
)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--env {name}: write NAME=VALUE")
    if names_secret(name) or has_secret(value):
        raise UserError(f"--env {name}: {SAFE}")
    return name, value


def check_command(root: click.Group, words: tuple[str, ...]) -> None:
    """UserError, or click's own, for what could not run on the cluster, before anything goes there."""
    name, *rest = words
    command = root.commands.get(name)
    if command is None or name == "submit":
        raise UserError(f"{name}: no command that can be a job; pretrain, say")
    if has_secret(" ".join(words)):
        raise UserError(SAFE)
    if isinstance(command, click.Group):  # its own commands say what they take
        return
    with command.make_context(name, list(rest)) as context:
        given = context.params
    if recipe := given.get("recipe"):
        if Path(recipe).is_absolute() or ".." in Path(recipe).parts:
            raise UserError(f"--config {recipe}: it has to lie in this folder, which goes to the cluster")
        _check_config(name, recipe, given)
    for option in OPTIONS:
        for place in [given[option]] if isinstance(given.get(option), str) else given.get(option) or ():
            _check_place(place)


def _check_config(name: str, recipe: str, given: dict[str, Any]) -> None:
    from cluster.options import keys_of
    from trainer.recipe import KINDS, parse_config, read_recipe

    if name in KINDS:
        keys = keys_of(given.get("init"), given.get("val"))
        tree = read_recipe(recipe, given["overrides"], keys)
        parse_config(KINDS[name], tree, recipe)
        for key, place in places_in(tree).items():  # a parsed config has whole paths, as they would be here
            _check_place(place, f"{key} ")


def _check_place(place: str, key: str = "") -> None:
    if place != "scratch" and "://" not in place and not place.startswith("/"):
        raise UserError(
            f"{key}{place}: machines of the cluster do not have this folder: give an s3:// URL, or a whole path that they "
            "share"
        )


def entrypoint(words: tuple[str, ...], retry: int) -> str:
    """What the head's shell is given. What ends in any other way than done (0), for a person to mend (2) or stopped (130, or
    128 + SIGTERM) is tried again there. The shell outlives the signal that stops the job, to say how the command ended, and
    starts nothing after it."""
    command = shlex.join(["maestream", *words])
    if not retry:
        return f"exec {command}"
    return (
        f"trap 'n={retry}' TERM INT; n=0; while :; do {command}; code=$?; "
        f"case $code in 0|2|130|143) exit $code;; esac; [ $n -lt {retry} ] || exit $code; "
        f'n=$((n+1)); echo "it crashed ($code): start $n of {retry} after the first"; done'
    )


def _connect(address: str) -> Any:
    """A client of the job server. UserError if it cannot be talked to, or runs other versions."""
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for talker in (
        "dashboard.modules.dashboard_sdk",
        "_private.runtime_env.packaging",
    ):  # of packages that are sent
        logging.getLogger(f"ray.{talker}").setLevel(logging.WARNING)
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: the job server's, http://head:8265 say")
    try:
        requests.get(f"{address}/api/version", timeout=TIMEOUT_S)
        client = JobSubmissionClient(address)
        cluster = client._do_request("GET", "/api/v0/cluster_metadata", timeout=TIMEOUT_S).json()["data"]
    except AuthenticationError:
        raise UserError(
            f"{address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (requests.RequestException, ConnectionError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{address}: no job server answers there ({_first_line(error)})") from None
    theirs = cluster["rayVersion"], ".".join(cluster["pythonVersion"].split(".")[:2])
    ours = ray.__version__, f"{sys.version_info.major}.{sys.version_info.minor}"
    if theirs != ours:
        raise UserError(
            f"{address} has Ray {theirs[0]} and Python {theirs[1]}, this machine {ours[0]} and {ours[1]}: they have to be the "
            "same; submit from the cluster's own image, say"
        )
    return client


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A copy of what is shipped of a folder: what git knows or does not ignore, and compiled modules, which it ignores.
    UserError if that is no git checkout, or more than MOST_BYTES."""
    if not shutil.which("git"):
        raise UserError("git is not installed here, and says which files go to the cluster")
    listing = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        raise UserError(
            f"{folder} is no git checkout: `git init` there, so that .gitignore says what stays at home"
        )
    names = [name for name in listing.stdout.split("\0") if name and Path(name).name != ".gitignore"]
    names += [str(path.relative_to(folder)) for path in folder.glob("pipeline/decode/*.so")]
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"{folder} is {sum(sizes.values()) / 1e6:,.0f} MB, and {MOST_BYTES / 1e6:,.0f} MB at most go to the cluster: add what "
            f"is not needed there to .gitignore ({largest} is {sizes[largest] / 1e6:,.0f} MB)"
        )
    with tempfile.TemporaryDirectory(prefix="maestream-job-") as copy:
        for name in sizes:
            to = Path(copy, name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, to)  # with its mode
        yield Path(copy)


def follow(client: Any, job: str) -> int:
    """Show a job's log until it ends, through lost connections. Returns its exit code. Ctrl-C leaves the job alone."""
    shown = 0  # characters

    async def tail() -> None:
        nonlocal shown
        seen = 0
        async for text in client.tail_job_logs(job):  # from its beginning
            print(text[max(shown - seen, 0) :], end="", flush=True)
            seen += len(text)
            shown = max(shown, seen)

    def look() -> Any:
        try:
            asyncio.run(tail())
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            console.print(f"the log is interrupted ({_first_line(error)}): asking again", style="yellow")
        return _info(client, job)

    try:
        info = _until_it_ends(look)
    except KeyboardInterrupt:
        console.print(f"job {job} goes on")
        return STOPPED
    console.print(f"job {job}: {info.status.lower()}")
    if info.status == "SUCCEEDED":
        return 0
    return STOPPED if info.status == "STOPPED" else info.driver_exit_code or 1


def _info(client: Any, job: str) -> Any:
    """What the cluster says of a job, None if it says nothing now. UserError if it does not know it any more."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise UserError(f"the cluster knows no job {job} any more: it has been started anew") from None
    except OSError:
        pass
    return None
