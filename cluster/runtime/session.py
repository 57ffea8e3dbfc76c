"""Connect to the Ray cluster at RAY_ADDRESS, or start one inside this process."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.exceptions
from ray.job_config import JobConfig

from pipeline.errors import UserError
from pipeline.storage.file_systems import SETTINGS

ROOT = Path(__file__).parents[2]  # the folder that contains our packages
START_TIMEOUT = "timed out during startup"  # in the text of a plain Exception of `ray.init`
INSTALLED = ("site-packages", "dist-packages")  # names of the folder that an installed package is in
IMPORT_ERROR = re.compile(r"(No module named|cannot import name .* from) '(pipeline|trainer|cluster)[.\w]*'")


class IsolatedJobConfig(JobConfig):
    """Job settings that keep the driver's current folder off the workers' import path.

    Ray puts that folder first on `sys.path` in every worker, where a user's `trainer.py` would hide our package `trainer`.
    For a checkout, this class puts the folder that contains our packages there instead, so that workers can import them
    whatever the current folder is. An installed maestream needs no such entry; with `site-packages` first, installed
    packages would win over those on PYTHONPATH.
    """

    def _get_proto_job_config(self) -> Any:
        current = os.path.abspath(os.curdir)
        if current in self._py_driver_sys_path:
            self._py_driver_sys_path.remove(current)
            if ROOT.name not in INSTALLED:
                self._py_driver_sys_path.append(str(ROOT))
        return super()._get_proto_job_config()


def connect(cores: int, environment: dict[str, str] | None = None) -> None:
    """Connect to the Ray cluster at RAY_ADDRESS, or start one with `cores` CPUs on this machine.

    Args:
        cores: number of CPUs of a cluster that is started here; ignored with RAY_ADDRESS.
        environment: environment variables for all processes of the job.

    Raises:
        UserError: if no cluster is reachable at RAY_ADDRESS, or Ray did not start within its time limit.
    """
    # How to talk to S3 is the same on all machines. Keys are not passed on: every user of a cluster could read them.
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": settings | (environment or {})},
    }
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_reachable(address)
    if not (address and address.startswith("ray://")):  # Ray's client does not send the current folder
        options["job_config"] = IsolatedJobConfig()
    if address:
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: {error}; if the cluster requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from None
    else:
        _start(cores, options)


def _start(cores: int, options: dict[str, Any]) -> None:
    """Start Ray with `cores` CPUs on this machine."""
    try:
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=128 * 2**20,
            **options,
        )
    except Exception as error:
        if START_TIMEOUT not in str(error):
            raise
        reason = str(error).partition(".")[0]  # Ray's first sentence; the others guess at causes
        raise UserError(
            f"Ray did not start on this machine within its time limit (is it busy?): run the command again ({reason})"
        ) from None


@contextmanager
def explain_import_errors() -> Iterator[None]:
    """Turn a Ray error into the `import_error` behind it, if there is one."""
    try:
        yield
    except ray.exceptions.RayError as error:
        if explained := import_error(error):
            raise explained from None
        raise


def import_error(error: BaseException) -> UserError | None:
    """Return a UserError if `error` says that a machine of the cluster cannot import our packages, else None.

    Either maestream is not installed on that machine, or a module on its PYTHONPATH hides one of our packages.
    """
    found = IMPORT_ERROR.search(str(error))
    return found and UserError(
        f"a machine of the cluster cannot import maestream ({found[0]}): install this version of it there, and start Ray "
        "without a PYTHONPATH that contains a module named pipeline, trainer or cluster"
    )


def check_reachable(address: str) -> None:
    """Check that a server accepts connections at host:port or ray://host:port. Ray itself would retry for minutes.

    Raises:
        UserError: if none does within 10 s.
    """
    target = urlsplit(address if "://" in address else f"ray://{address}")
    if target.hostname and target.port:
        try:
            socket.create_connection((target.hostname, target.port), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray cluster is reachable at this address ({error})"
            ) from None
