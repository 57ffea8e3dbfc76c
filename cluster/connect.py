"""The Ray cluster of RAY_ADDRESS, or one embedded in this process."""

import logging
import os
import socket
from typing import Any
from urllib.parse import urlsplit

import ray

from pipeline.errors import UserError


def connect(cores: int, environment: dict[str, str] | None = None) -> None:
    """Connect to the cluster, or start one of so many cores on this machine.

    UserError where nothing listens at RAY_ADDRESS. `environment`: variables for all of the job's processes.
    """
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": environment or {}},
    }
    if address := os.environ.get("RAY_ADDRESS"):
        check_reachable(address)
        ray.init(address=address, **options)
    else:
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=128 * 2**20,
            **options,
        )


def check_reachable(address: str) -> None:
    """UserError where nothing listens at host:port or ray://host:port; Ray itself would try for many minutes."""
    target = urlsplit(address if "://" in address else f"ray://{address}")
    if target.hostname and target.port:
        try:
            socket.create_connection((target.hostname, target.port), timeout=10).close()
        except OSError as error:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
