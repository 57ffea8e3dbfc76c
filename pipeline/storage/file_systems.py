"""The fsspec file system of a URL, with the options that we need.

    s3://bucket/prefix              AWS, and other stores with S3's protocol
    gs://, az://, abfs://, hf://    need a package that is not always installed, see PACKAGES
    any other protocol of fsspec    as it is

The bucket of s3://anonymous@bucket/prefix is read without credentials, although there may be some for other buckets. The URL
says so, and no variable, because URLs go to all processes and machines that need them, and into the manifests of indexes.
"""

import os
import re
from typing import Any

import fsspec

from pipeline.errors import UserError

ANONYMOUS = "anonymous@"
ANONYMOUS_SCHEMES = ("s3", "gs")
# Variables without secrets that say how to talk to S3. The first two are not the AWS library's: GDAL and others use them.
SETTINGS = (
    "AWS_NO_SIGN_REQUEST",
    "AWS_REQUEST_PAYER",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
# Scheme → package, and the extra of maestream that installs it.
PACKAGES = {
    "hf": ("huggingface_hub", "hf"),
    "gs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
}
ALIASES = {"gcs": "gs", "abfs": "az", "abfss": "az", "s3a": "s3"}
# Objects of these appear only when they are complete.
ATOMIC_SCHEMES = ("s3", "gs", "az", "memory")
# What cannot be written to, and why.
READ_ONLY = {
    "hf": "each file would be a commit of the repository: write to a folder or a bucket, and upload that with `hf upload`",
    "http": "a web server has no files that can be replaced: write to a folder or a bucket",
}
READ_OPTIONS = {"hf": {"cache_type": "none"}}  # by default, each range would be read with 5 MB after it


def scheme_of(url: str) -> str:
    """The scheme of a URL, the same for all names of a protocol: "az" for abfs://. "" for a local path."""
    scheme, separator, _ = url.partition("://")
    scheme = scheme.rpartition("::")[2].lower()
    return ALIASES.get(scheme, "http" if scheme == "https" else scheme) if separator else ""


def is_anonymous(url: str) -> bool:
    """Whether requests to this URL are made without credentials."""
    if scheme_of(url) == "s3" and os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in (
        "yes",
        "true",
        "1",
        "on",
    ):
        return True
    return scheme_of(url) in ANONYMOUS_SCHEMES and url.partition("://")[2].startswith(ANONYMOUS)


def anonymous_url(url: str) -> str:
    """The URL with which the bucket is read without credentials. UserError if its protocol does not need that."""
    if scheme_of(url) not in ANONYMOUS_SCHEMES:
        hint = "; for Azure, set AZURE_STORAGE_ANON=true" if scheme_of(url) == "az" else ""
        raise UserError(f"--anonymous is for URLs that begin with s3:// or gs://, not for {url}{hint}")
    scheme, _, rest = url.partition("://")
    return url if rest.startswith(ANONYMOUS) else f"{scheme}://{ANONYMOUS}{rest}"


def open_file_system(url: str, stall_s: float, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of a URL or an absolute path, and the path in it. UserError if the URL is not valid.

    Args:
        stall_s: read timeout of S3: no byte for this long in the middle of a response.
        options: further options of the file system.
    """
    scheme = scheme_of(url)
    options = {**_options(url, scheme, stall_s), **options}
    where = url.replace(f"://{ANONYMOUS}", "://", 1) if scheme in ANONYMOUS_SCHEMES else url
    try:
        return fsspec.core.url_to_fs(where, **options)
    except ImportError as error:
        if scheme not in PACKAGES:
            raise UserError(f"{url}: {error}") from error
        package, extra = PACKAGES[scheme]
        raise UserError(
            f'{url}: {scheme}:// needs the package {package}: pip install "maestream[{extra}]", or pip install {package}'
        ) from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


def _options(url: str, scheme: str, stall_s: float) -> dict[str, Any]:
    if scheme not in ("s3", "gs", "az", "http"):
        return {}
    options: dict[str, Any] = {
        # Other processes add and remove files, so a cached listing may be out of date.
        "use_listings_cache": False
    }
    if scheme == "gs" and is_anonymous(url):
        options["token"] = "anon"
    if scheme == "s3":
        options |= {
            "anon": is_anonymous(url),
            "requester_pays": os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester",
            "config_kwargs": {
                "connect_timeout": min(stall_s, 5),
                "read_timeout": stall_s,
                "retries": {"max_attempts": 0},  # `Store` retries
                "max_pool_connections": 64,  # botocore's default of 10 is fewer than our concurrent reads
            },
        }
    return options


def is_folder_marker(path: str, size: int | None) -> bool:
    """Whether an object stands for a folder, as some tools write them: its key ends with a slash, or as Hadoop's do."""
    return path.endswith("/") or (size == 0 and path.endswith("_$folder$"))


def without_folder_markers(sizes: dict[str, int]) -> dict[str, int]:
    """The files of a listing, without objects that stand for folders. An empty object above others is one of them."""
    folders = {path[: slash.start()] for path in sizes for slash in re.finditer("/", path)}
    return {
        path: size
        for path, size in sizes.items()
        if not is_folder_marker(path, size) and not (size == 0 and path in folders)
    }
