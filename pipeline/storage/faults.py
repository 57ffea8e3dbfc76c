"""Storage errors: which ones are retried, and what the user should do about the others."""

import errno
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import botocore.exceptions
import botocore.parsers

from pipeline.errors import UserError
from pipeline.secrets import without_secrets
from pipeline.storage.file_systems import is_anonymous, scheme_of


class ShortReadError(OSError):
    """Storage returned fewer or more bytes than requested."""


# Faults: transient errors, which are retried.
FAULTS = (
    OSError,  # includes ShortReadError, ConnectionError, TimeoutError and what s3fs raises for 5xx responses
    aiohttp.ClientError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.FlexibleChecksumError,  # a body that does not have the checksum that came with it
    botocore.parsers.ResponseParserError,  # a response that is not from S3, for example from a load balancer
)
NOT_FAULTS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Other stores' libraries need not be installed, so their errors are known by their names.
LIBRARIES = ("adlfs", "azure", "gcsfs", "google", "httpcore", "httpx", "httpx2", "huggingface_hub")
NETWORK_ERRORS = {
    "TransportError",  # httpx, google.auth
    "ServiceRequestError",  # azure
    "ServiceResponseError",
}
HUB_ERRORS = (
    "RepositoryNotFoundError",
    "GatedRepoError",
    "RevisionNotFoundError",
)  # behind a FileNotFoundError
RETRIED_STATUS = (408, 425, 429)  # and 5xx: RFC 9110, RFC 8470, RFC 6585

# Since version 1.36, botocore sends a checksum with each upload and checks those of responses (botocore#3352, boto3#4400).
# Stores that do not know them answer with any of these.
CHECKSUM_CODES = {"XAmzContentSHA256Mismatch", "NotImplemented", "501", "MissingContentLength"}
CHECKSUM_TEXT = re.compile(r"(?i)checksum|trailer|aws-chunked|x-amz-(content-sha256|sdk)|streaming-")
CHECKSUM_VARIABLES = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")

MAX_TEXT = 300  # characters of a library's message: some have the whole response in it
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
# Scheme → what to do if access is denied.
ACCESS = {
    "": "Check the owner and mode of the file",
    "s3": f"Check {KEYS}; if the bucket's readers pay for requests, set AWS_REQUEST_PAYER=requester",
    "gs": "Log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "Check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; for a public container, set AZURE_STORAGE_ANON=true",
    "hf": "Log in with `hf auth login`, or set HF_TOKEN",
}


def is_fault(error: BaseException | None) -> bool:
    """Whether the error may be transient, so that a retry can succeed."""
    if isinstance(error, NOT_FAULTS):
        return False
    if isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.ENOSYS):
        return (
            False  # s3fs raises these for a malformed request, and for one that the store does not implement
        )
    status = _status_of(error)
    if status is not None and s3_error_code(error) is None:
        return status in RETRIED_STATUS or (status >= 500 and status != 501)
    return isinstance(error, FAULTS) or _is_network_error(error)


def _is_network_error(error: BaseException | None) -> bool:
    return any(kind.__name__ in NETWORK_ERRORS for kind in type(error).__mro__)


def s3_error_code(error: BaseException | None) -> str | None:
    """Return S3's error code, such as "NoSuchUpload", if s3fs raised the error for a response of S3."""
    response: dict[str, Any] = getattr(getattr(error, "__cause__", None), "response", None) or {}
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of the response that an error of any store's library stands for."""
    answer = getattr(getattr(error, "__cause__", None), "response", None)
    if isinstance(answer, dict):  # s3fs raises its errors from botocore's
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if type(error) is OSError and str(error).startswith("Forbidden: "):  # gcsfs
        return 403
    response = getattr(error, "response", None)
    # httpx and requests; azure; aiohttp; gcsfs
    for holder, name in (
        (response, "status_code"),
        (error, "status_code"),
        (error, "status"),
        (error, "code"),
    ):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return None


def is_beyond_end(error: BaseException) -> bool:
    """Whether the error is the answer 416, Range Not Satisfiable: the object has no byte in the range."""
    return _status_of(error) == 416


def may_be_checksums(error: BaseException | None) -> bool:
    """Whether an S3 store may have refused, or not sent, the checksums that the AWS library uses by default."""
    if isinstance(error, botocore.exceptions.FlexibleChecksumError):
        return True
    code = s3_error_code(error)
    return code is not None and (code in CHECKSUM_CODES or bool(CHECKSUM_TEXT.search(str(error))))


@contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Raise storage errors that need the user's action as a UserError about `where`. FileNotFoundError passes unchanged."""
    try:
        yield
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error):  # the text of S3's NoSuchBucket
            raise UserError(f"{where}: the bucket does not exist: create it, or check its name") from error
        if type(error.__cause__).__name__ in HUB_ERRORS:
            raise UserError(
                f"{where}: the repository or its revision does not exist, or is private or gated. {ACCESS['hf']}"
            ) from error
        raise
    except Exception as error:
        if not _is_storage_error(error):
            raise
        if _status_of(error) == 404 and s3_error_code(error) is None:
            raise FileNotFoundError(where) from error
        raise UserError(f"{without_secrets(where)}: {_advice(error, where)}") from error


def _is_storage_error(error: Exception) -> bool:
    if isinstance(error, (*FAULTS, botocore.exceptions.BotoCoreError)) or _is_network_error(error):
        return True
    if isinstance(error, ValueError) and "Invalid endpoint" in str(error):
        return True
    return type(error).__module__.partition(".")[0] in LIBRARIES


def _advice(error: Exception, where: str) -> str:
    """Return what a storage error means and what to do about it."""
    scheme = scheme_of(where)
    what = without_secrets(textwrap.shorten(str(error), MAX_TEXT, placeholder=" …")) or type(error).__name__
    if isinstance(error, TimeoutError) and not str(error):
        what = "timed out before the whole response arrived"
    number = getattr(error, "errno", None)
    if scheme == "s3" and (advice := _s3_advice(error, what, where)):
        return advice
    if isinstance(error, PermissionError) or _status_of(error) in (401, 403):
        return f"access denied ({what}). {ACCESS.get(scheme, 'Check your credentials')}"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "part of this path is a file, not a folder"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "no space left: free some space and run the command again"
    if "bucket is not valid" in what:
        return "this is not a valid bucket name"
    if scheme == "s3":
        advice = "Check AWS_ENDPOINT_URL, AWS_PROFILE and the network"
        return f"the object store cannot be reached, or answers with errors ({what}). {advice}"
    return f"cannot read or write ({what})"


def _s3_advice(error: Exception, what: str, where: str) -> str | None:
    """What to do about an error that only S3 has; None for others."""
    code = s3_error_code(error)
    if "Credential" in type(error).__name__:
        return (
            f"no S3 credentials ({what}): set {KEYS}. A bucket that is open to everyone is read without: "
            f"{_anonymous_bucket(where)}, or --anonymous where a command has it, or AWS_NO_SIGN_REQUEST=YES for all buckets"
        )
    if isinstance(error, PermissionError) and is_anonymous(where):
        return f"access denied without credentials ({what}): the bucket does not allow this to everyone. Use keys: {KEYS}"
    if code == "InvalidAccessKeyId":
        return f"access denied ({what}): the store does not know this AWS_ACCESS_KEY_ID. Check {KEYS}"
    if code == "SignatureDoesNotMatch":
        return f"access denied ({what}). Check {KEYS}. If they are right, {_without_checksums()}"
    if may_be_checksums(error):
        return f"the store did not accept the request, or its response is not intact ({what}): {_without_checksums()}"
    return None


def _anonymous_bucket(where: str) -> str:
    return "s3://anonymous@" + where.partition("://")[2].partition("/")[0] + "/…"


def _without_checksums() -> str:
    """What helps with stores that do not know the AWS library's checksums."""
    missing = [
        f"{name}=when_required" for name in CHECKSUM_VARIABLES if os.environ.get(name) != "when_required"
    ]
    if not missing:
        return "a proxy may change requests on their way to the store: check AWS_ENDPOINT_URL"
    return f"the store may not know the AWS library's default checksums: set {' and '.join(missing)}"
