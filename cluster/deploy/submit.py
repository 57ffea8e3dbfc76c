"""Submit a command to a Ray cluster as a job, and follow its log."""

import asyncio
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import all_suffixes
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

from cluster.deploy.paths import PATH_OPTIONS, paths_in
from cluster.terminal.console import console
from pipeline.errors import UserError
from pipeline.secrets import has_secret

PACKAGES = ("pipeline", "trainer", "cluster")  # maestream's own
MAX_BYTES = 100 << 20  # of the uploaded files; Ray's own limit is 512 MiB
RECONNECT_S = 5.0  # wait before reconnecting to a job's log
TIMEOUT_S = 10.0  # of a request to the job server
NO_SECRETS = (
    "a job must not contain secrets, because everyone on the cluster can read its description: give the machines a role, "
    "or mount a secret in them"
)
EXIT_STOPPED = 130  # exit code of a command that was stopped


# A cluster that has just started answers "try again later".
retry_until_ready = Retrying(
    retry=retry_if_exception_message(match=r"(?s).*try again later"),
    stop=stop_after_delay(60),
    wait=wait_random_exponential(max=5),
    reraise=True,
)

_retry_until_finished = Retrying(
    retry=retry_if_result(lambda info: info is None or not info.status.is_terminal()),
    wait=wait_fixed(RECONNECT_S),
)


def check_command(root: click.Group, words: tuple[str, ...]) -> None:
    """Check here that a command can run on the cluster, before anything is uploaded.

    Args:
        root: the command group `maestream`.
        words: the command with its options, without `maestream`.

    Raises:
        UserError, click.UsageError: if it cannot.
    """
    name, *rest = words
    command = root.commands.get(name)
    if command is None or name == "submit":
        raise UserError(f"{name}: not a command that can run as a job (pretrain, for example, can)")
    if has_secret(" ".join(words)):
        raise UserError(NO_SECRETS)
    if isinstance(command, click.Group):
        return  # its sub-commands check their own options, on the cluster
    with command.make_context(name, list(rest)) as context:
        options = context.params
    if recipe := options.get("recipe"):
        if Path(recipe).is_absolute() or ".." in Path(recipe).parts:
            raise UserError(
                f"--config {recipe}: must be in the current folder, which is uploaded to the cluster"
            )
        _check_config(name, recipe, options)
    for option in PATH_OPTIONS:
        value = options.get(option)
        for path in [value] if isinstance(value, str) else value or ():
            _check_path(path)


def _check_config(task: str, recipe: str, options: dict[str, Any]) -> None:
    from trainer.config.recipe import CONFIG_TYPES, keys_from_options, parse_config, read_recipe

    if task in CONFIG_TYPES:
        keys = keys_from_options(options.get("init"), options.get("val"))
        tree = read_recipe(recipe, options["overrides"], keys)
        parse_config(CONFIG_TYPES[task], tree, recipe, tuple(options["overrides"]))
        # Not the parsed config: in it relative paths have become absolute paths of this machine.
        for key, path in paths_in(tree).items():
            _check_path(path, f"{key} ")


def _check_path(path: str, key: str = "") -> None:
    if path != "scratch" and "://" not in path and not path.startswith("/"):
        raise UserError(
            f"{key}{path}: this relative path does not exist on the cluster: use an s3:// URL, or an absolute path that all "
            "its machines share"
        )


def entrypoint(words: tuple[str, ...], retry: int) -> str:
    """Return the shell command that runs on the head node.

    It runs the command again after a crash, which is any exit code but these: 0 (done), 2 (user error), 130 (stopped) and
    143 (128 + SIGTERM). A signal that stops the job does not end the shell: it waits for the command, returns its exit code
    and does not retry.

    Args:
        words: the command with its options, without `maestream`.
        retry: how often the command is run again after a crash.
    """
    command = shlex.join(["maestream", *words])
    if not retry:
        return f"exec {command}"
    return (
        f"trap 'n={retry}' TERM INT; n=0; while :; do {command}; code=$?; "
        f"case $code in 0|2|130|143) exit $code;; esac; [ $n -lt {retry} ] || exit $code; "
        f'n=$((n+1)); echo "the command crashed (exit code $code): retry $n of {retry}"; done'
    )


def connect(address: str) -> Any:
    """Return a client of the job server at `address`.

    Raises:
        UserError: if it cannot be reached, or runs other versions of Ray or Python than this machine.
    """
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # they log each upload
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: expected the job server's URL, for example http://head:8265")
    try:
        requests.get(f"{address}/api/version", timeout=TIMEOUT_S)
        client = JobSubmissionClient(address)
        cluster = client._do_request("GET", "/api/v0/cluster_metadata", timeout=TIMEOUT_S).json()["data"]
    except AuthenticationError:
        raise UserError(
            f"{address} requires a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (requests.RequestException, ConnectionError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{address}: no job server responds ({first_line(error)})") from None
    python = ".".join(cluster["pythonVersion"].split(".")[:2])
    theirs = f"Ray {cluster['rayVersion']} and Python {python}"
    ours = f"Ray {ray.__version__} and Python {sys.version_info.major}.{sys.version_info.minor}"
    if theirs != ours:
        raise UserError(
            f"{address} has {theirs}, but this machine has {ours}: the versions must be equal; for example, submit from the "
            "cluster's image"
        )
    return client


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary copy of a folder with only the files that are uploaded.

    These are the files that git tracks or does not ignore, and the compiled modules of `pipeline`, which git ignores.

    Raises:
        UserError: if the folder is not in a git repository, has more than MAX_BYTES of such files, or would hide one of
            maestream's packages.
    """
    names = _files_to_upload(folder)
    with tempfile.TemporaryDirectory(prefix="maestream-job-") as copy:
        for name in names:
            target = Path(copy, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, target)  # keeps the file's mode
        yield Path(copy)


def _files_to_upload(folder: Path) -> list[str]:
    """Return the names, relative to the folder, of the files to upload. UserError as in `staged`."""
    names = [
        *_files_known_to_git(folder),
        *(str(p.relative_to(folder)) for p in folder.glob("pipeline/decode/*.so")),
    ]
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    hiding = next(filter(_hides_package, sizes), None)
    if hiding and "maestream.py" not in sizes:  # a checkout of maestream contains the packages themselves
        raise UserError(
            f"{folder / hiding} would hide maestream's package of that name on the cluster, where this folder comes first on "
            "Python's path: rename it, add it to .gitignore, or submit from another folder"
        )
    if (total := sum(sizes.values())) > MAX_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"{folder} has {total / 1e6:,.0f} MB of files, but at most {MAX_BYTES / 1e6:,.0f} MB can be uploaded: add files that "
            f"the job does not need to .gitignore (the largest is {largest}, {sizes[largest] / 1e6:,.0f} MB)"
        )
    return list(sizes)


def _files_known_to_git(folder: Path) -> list[str]:
    """Return the names of the files that git tracks or does not ignore, without .gitignore files."""
    if not shutil.which("git"):
        raise UserError(
            "git is not installed: install it, because it selects the files to upload to the cluster"
        )
    listing = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        raise UserError(
            f"{folder} is not in a git repository: run `git init` there, so that .gitignore can exclude files from the upload"
        )
    return [name for name in listing.stdout.split("\0") if name and Path(name).name != ".gitignore"]


def _hides_package(name: str) -> bool:
    """Return whether Python would import this file of the working directory instead of one of maestream's packages.

    A folder without `__init__.py` hides nothing: Python prefers a package from anywhere on its path.
    """
    module, _, suffix = name.partition(".")
    return f".{suffix}" in all_suffixes() and module.removesuffix("/__init__") in PACKAGES


def follow(client: Any, job: str) -> int:
    """Print a job's log until the job ends, and return its exit code.

    Reconnects after a lost connection. Ctrl-C ends the output, not the job.

    Raises:
        UserError: if the cluster no longer has the job.
    """
    printed = 0  # characters of the log

    async def tail() -> None:
        nonlocal printed
        received = 0
        async for text in client.tail_job_logs(job):  # always from the beginning of the log
            print(text[max(printed - received, 0) :], end="", flush=True)
            received += len(text)
            printed = max(printed, received)

    def print_log() -> Any:
        try:
            asyncio.run(tail())
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            console.print(
                f"lost the connection to the log ({first_line(error)}): reconnecting", style="yellow"
            )
        return _job_info(client, job)

    try:
        info = _retry_until_finished(print_log)
    except KeyboardInterrupt:
        console.print(f"job {job} keeps running")
        return EXIT_STOPPED
    console.print(f"job {job}: {info.status.lower()}")
    if info.status == "SUCCEEDED":
        return 0
    return EXIT_STOPPED if info.status == "STOPPED" else info.driver_exit_code or 1


def _job_info(client: Any, job: str) -> Any:
    """Return the state of a job; None if the cluster does not respond.

    Raises:
        UserError: if the cluster does not know the job.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise UserError(f"job {job} no longer exists: the cluster has been restarted") from None
    except OSError:
        pass
    return None
