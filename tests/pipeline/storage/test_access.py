"""Buckets without credentials, buckets whose readers pay, objects that stand for folders, and what stores say about keys and
checksums."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from s3fs import S3FileSystem

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.faults import CHECKSUM_VARIABLES
from pipeline.storage.store import open_store
from tests.support.command_line import printed, refused
from tests.support.data.loaders import make_loader
from tests.support.fault_proxy import answer, fault_proxy
from tests.support.public_bucket import KEYS, PublicBucket, public_bucket

pytestmark = pytest.mark.integration
NO_KEYS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/none",
    "AWS_SHARED_CREDENTIALS_FILE": "/none",
}


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No credentials in this process, nor in those that it starts."""
    for name in (*KEYS, *CHECKSUM_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in NO_KEYS.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(scenes: Dataset, no_keys: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[PublicBucket]:
    """s3://public with a dataset in scenes/, its tars in tars/, and folders of images with objects for the folders."""
    objects = {f"scenes/{name}": scenes.store.read(name) for name in scenes.store.names()}
    objects |= {f"tars/{name}": scenes.shard_store.read(name) for name in scenes.shard_names.to_pylist()}
    rows = scenes.read_index_table(0).slice(0, 4)
    tar = scenes.shard_store.read(scenes.shard_name(0))
    for number, (o, s) in enumerate(zip(rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True)):
        objects[f"photos/{'cat' if number % 2 else 'dog'}/{number}.jpg"] = tar[o : o + s]
    markers = (
        "photos/",
        "photos",
        "photos/cat/",
        "photos/dog",
        "photos/dog_$folder$",
        "tars/",
        "scenes/index/",
    )
    with public_bucket({**objects, **dict.fromkeys(markers, b"")}) as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.url)
        yield bucket


def test_without_credentials_the_message_names_the_ways_without(bucket: PublicBucket, tmp_path: Path) -> None:
    message = refused("shards", "build", "s3://public/photos", tmp_path / "x")
    for words in (
        "no S3 credentials",
        "AWS_ACCESS_KEY_ID",
        "--anonymous",
        "s3://anonymous@public/",
        "AWS_NO_SIGN_REQUEST",
    ):
        assert words in message
    assert not bucket.requests


def test_commands_read_a_public_bucket(bucket: PublicBucket, scenes: Dataset, tmp_path: Path) -> None:
    assert "wrote 4 images" in printed(
        "shards", "build", "s3://public/photos", tmp_path / "photos", "--anonymous"
    )
    assert open_dataset(str(tmp_path / "photos")).manifest.classes == ["cat", "dog"]
    words = ("index", "s3://public/tars", "--to", tmp_path / "index", "--anonymous")
    assert "indexed 70 images" in printed("shards", *words)
    for name, words in (("show", ()), ("show", ("--anonymous",))):
        url = "s3://public/scenes" if words else "s3://anonymous@public/scenes"
        assert "70" in printed("shards", name, url, *words)
    assert "s3://anonymous@public/tars" in printed("shards", "show", tmp_path / "index")
    assert bucket.refused == 0
    assert "access denied without credentials" in refused(
        "shards", "build", "synthetic:?count=1", "s3://anonymous@public/x"
    )
    assert "add --to" in refused("shards", "index", "s3://public/tars", "--anonymous")
    assert "not for" in refused("shards", "show", tmp_path / "index", "--anonymous")


@pytest.mark.parametrize("how", ["url", "variable"])
def test_the_loader_reads_a_public_bucket_in_its_own_process(
    bucket: PublicBucket, scenes: Dataset, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a dataset whose index lies elsewhere: its manifest says how the tars are read."""
    if how == "variable":
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    here = "s3://public" if how == "variable" else "s3://anonymous@public"
    printed("shards", "index", f"{here}/tars", "--to", tmp_path, "--checksums")
    for url in (f"{here}/scenes", str(tmp_path)):
        dataset = open_dataset(url)
        for ours, theirs in zip(
            make_loader(scenes).steps(0, 2), make_loader(dataset).steps(0, 2), strict=True
        ):
            assert torch.equal(ours.images, theirs.images)
    assert bucket.refused == 0


def test_a_bucket_whose_readers_pay(bucket: PublicBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.requester_pays = True
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-the-payer")
    assert "AWS_REQUEST_PAYER=requester" in refused("shards", "show", "s3://public/scenes")
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    S3FileSystem.clear_instance_cache()
    bucket.refused = 0
    dataset = open_dataset("s3://public/scenes")
    assert verify(dataset) == []
    assert next(iter(make_loader(dataset).steps(0, 1))).images.shape[0]
    assert bucket.refused == 0


def test_objects_that_stand_for_folders_are_no_files(bucket: PublicBucket) -> None:
    store = open_store("s3://anonymous@public/photos")
    names = ["cat/1.jpg", "cat/3.jpg", "dog/0.jpg", "dog/2.jpg"]
    assert store.names() == list(store.sizes()) == names
    assert store.names("dog") == names[2:]
    assert store.entries(folders=True) == ["cat", "dog"]
    assert store.entries(folders=False) == []
    above = open_store("s3://anonymous@public")
    assert above.entries(folders=True) == ["photos", "scenes", "tars"]
    assert above.entries(folders=False) == []
    bucket.objects["photos/empty.jpg"] = b""  # an empty file stays one
    assert store.sizes()["empty.jpg"] == 0
    assert store.entries(folders=False) == ["empty.jpg"]


def test_a_real_server_with_objects_that_stand_for_folders(s3: str) -> None:
    store = open_store(f"{s3}/marked")
    for name in ("a/1", "a/b/2"):
        store.write(name, b"1")
    S3FileSystem.clear_instance_cache()
    for key in ("marked/", "marked/a/", "marked/empty/"):
        store.fs.call_s3("put_object", Bucket=s3.removeprefix("s3://"), Key=key, Body=b"")
    assert store.sizes() == {"a/1": 1, "a/b/2": 1}
    assert store.entries(folders=False) == []
    assert set(store.entries(folders=True)) >= {"a"}
    assert store.names("a") == ["a/1", "a/b/2"]
    assert store.names("empty") == []


CURE = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


def refusal(status: str, code: str, text: str) -> bytes:
    return answer(
        status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
    )


@pytest.mark.parametrize(
    ("status", "code", "text", "words", "cure"),
    [
        (
            "403 Forbidden",
            "SignatureDoesNotMatch",
            "The signature does not match",
            "AWS_SECRET_ACCESS_KEY",
            True,
        ),
        (
            "400 Bad Request",
            "XAmzContentSHA256Mismatch",
            "The x-amz-content-sha256 does not match",
            "did not accept the request",
            True,
        ),
        (
            "501 Not Implemented",
            "NotImplemented",
            "A header you provided is not implemented",
            "did not accept the request",
            True,
        ),
        (
            "400 Bad Request",
            "InvalidArgument",
            "x-amz-sdk-checksum-algorithm is not supported",
            "did not accept the request",
            True,
        ),
        (
            "411 Length Required",
            "MissingContentLength",
            "You must provide the length",
            "did not accept the request",
            True,
        ),
        ("403 Forbidden", "InvalidAccessKeyId", "No such key", "does not know this AWS_ACCESS_KEY_ID", False),
        ("403 Forbidden", "AccessDenied", "Access Denied", "access denied", False),
        (
            "400 Bad Request",
            "InvalidArgument",
            "a bad argument",
            "cannot be reached, or answers with errors",
            False,
        ),
    ],
)
def test_an_upload_that_a_store_refuses(
    s3: str, status: str, code: str, text: str, words: str, cure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the variables only where they can help, soon, and not if they are set already."""
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert upstream
    for name in CHECKSUM_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with fault_proxy(upstream) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        S3FileSystem.clear_instance_cache()
        store = open_store(f"{s3}/refused")
        assert store.names() == []  # reading works
        proxy.share = 1.0
        proxy.faults = [lambda line: refusal(status, code, text) if line.startswith("PUT") else None]
        begin = time.monotonic()
        with pytest.raises(UserError, match=words) as found:
            store.write("a", b"1")
        assert time.monotonic() - begin < 20  # not as long as an outage is waited for
        assert (CURE in str(found.value)) == cure
        assert text in str(found.value)
        for name in CHECKSUM_VARIABLES:
            monkeypatch.setenv(name, "when_required")
        S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError) as found:
            open_store(f"{s3}/refused").write("a", b"1")
        assert "when_required" not in str(found.value)
    S3FileSystem.clear_instance_cache()


def test_the_named_variables_help_with_a_store_without_checksums(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that refuses every upload that has a checksum takes it with the variables."""
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert upstream
    data = random.Random(0).randbytes(1000)
    with fault_proxy(upstream) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.refused_header = b"x-amz-checksum"
        for value in (None, "when_required"):
            for name in CHECKSUM_VARIABLES:
                monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
            S3FileSystem.clear_instance_cache()
            store = open_store(f"{s3}/without")
            if value is None:
                with pytest.raises(UserError, match="when_required"):
                    store.write("a", data)
            else:
                store.write("a", data)
                assert store.read("a") == data
    S3FileSystem.clear_instance_cache()


def test_wrong_keys_are_told_apart(s3: str) -> None:
    """A real server."""
    message = refused("shards", "show", f"{s3}/nothing", AWS_SECRET_ACCESS_KEY="wrong")
    assert "access denied" in message
    assert "AWS_SECRET_ACCESS_KEY" in message
    message = refused("shards", "show", f"{s3}/nothing", AWS_ACCESS_KEY_ID="nobody")
    assert "access denied" in message
    assert "AWS_ACCESS_KEY_ID" in message
