"""Storage errors: which ones are retried, and what the user should do about the others."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import botocore.exceptions
import botocore.parsers

from pipeline.errors import UserError


class ShortReadError(OSError):
    """Storage returned fewer or more bytes than requested."""


# Faults: transient errors, which are retried.
FAULTS = (
    OSError,  # includes ShortReadError, ConnectionError, TimeoutError and what s3fs raises for 5xx responses
    aiohttp.ClientError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,  # a response that is not from S3, for example from a load balancer
)
NOT_FAULTS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_fault(error: BaseException) -> bool:
    """Whether the error may be transient, so that a retry can succeed."""
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return False  # s3fs raises this for a malformed request
    return isinstance(error, FAULTS) and not isinstance(error, NOT_FAULTS)


def s3_error_code(error: BaseException) -> str | None:
    """Return S3's error code, such as "NoSuchUpload", if s3fs raised the error for a response of S3."""
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code")


@contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Raise storage errors that need the user's action as a UserError about `where`. FileNotFoundError passes unchanged."""
    try:
        yield
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error):  # the text of S3's NoSuchBucket
            raise UserError(f"{where}: the bucket does not exist: create it, or check its name") from error
        raise
    except (*FAULTS, ValueError, botocore.exceptions.BotoCoreError) as error:
        if isinstance(error, ValueError) and "Invalid endpoint" not in str(error):
            raise
        raise UserError(f"{where}: {_advice(error, where.startswith('s3://'))}") from error


def _advice(error: Exception, s3: bool) -> str:
    """Return what a storage error means and what to do about it."""
    what = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TimeoutError) and not str(error):
        what = "timed out before the whole response arrived"
    number = getattr(error, "errno", None)
    if isinstance(error, PermissionError):
        return f"access denied ({what}). Check " + (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if s3 else "the owner and mode of the file"
        )
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "part of this path is a file, not a folder"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "no space left: free some space and run the command again"
    if "bucket is not valid" in what:
        return "this is not a valid bucket name"
    if "Credential" in type(error).__name__:
        return f"no S3 credentials ({what}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if s3:
        advice = "Check AWS_ENDPOINT_URL, AWS_PROFILE and the network"
        return f"the object store cannot be reached, or answers with errors ({what}). {advice}"
    return f"cannot read or write ({what})"
