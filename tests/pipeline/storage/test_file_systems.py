"""Any file system of fsspec is a store; which one a URL needs, and what is said if its package is not installed."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import fsspec
import pytest
from aiohttp.http_exceptions import ContentLengthError
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.index import find_shards, index_shards
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage import faults
from pipeline.storage.file_systems import SETTINGS, anonymous_url, is_anonymous, open_file_system, scheme_of
from pipeline.storage.store import Store, absolute_url, open_store
from tests.support.command_line import refused
from tests.support.datasets import build_dataset


class FileServer(LocalFileSystem):
    """Stands for file systems such as sftp: a folder must exist, and files grow while they are written."""

    protocol = "server"
    renamed: ClassVar[list[tuple[str, str]]] = []
    async_impl = False

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        self.renamed.append((path1, path2))
        super().mv(path1, path2, **kwargs)


class Archive(LocalFileSystem):
    """Stands for file systems that only read, such as github."""

    protocol = "archive"

    def put_file(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    rm_file = makedirs = put_file


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    for kind in (FileServer, Archive):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    yield
    for kind in (FileServer, Archive):
        _registry.pop(kind.protocol)


@pytest.fixture(params=["memory", "server"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(f"{request.param}://{tmp_path}/store")


def test_any_file_system_reads_writes_and_lists(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.store.PART_BYTES", 1 << 10)
    data = random.Random(0).randbytes(5000)
    assert not store.is_local
    assert store.names() == []
    assert not store.exists("")
    store.write("a/b/large", bytes(9000))
    for name, content in {"a/b/large": data, "a/empty": b"", "z": b"1"}.items():
        store.write(name, content)
        assert store.read(name) == content
        assert store.size(name) == len(content)
    assert store.names() == ["a/b/large", "a/empty", "z"]
    assert store.sizes("a") == {"a/b/large": 5000, "a/empty": 0}
    assert (store.entries(folders=True), store.entries(folders=False)) == (["a"], ["z"])
    assert store.exists("a")
    assert store.read_range("a/b/large", 1000, 300) == data[1000:1300]
    assert store.read_range("a/b/large", 4990, 10) == data[4990:]
    into = bytearray(100)
    store.read_into("a/b/large", 7, memoryview(into))
    assert into == data[7:107]
    with pytest.raises(UserError, match="shorter than the manifest says"):
        store.read_range("a/b/large", 4990, 11)
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.size("nothing")
    store.remove(["a/b/large", "a/empty"])
    assert store.names() == ["z"]


def test_a_file_on_a_file_server_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    store = open_store(f"server://{tmp_path}/files")
    FileServer.renamed.clear()
    store.write("a/b", b"new")
    ((before, after),) = FileServer.renamed
    assert Path(before).parent == Path(after).parent
    assert Path(before).name.startswith(".maestream-")
    assert store.names() == ["a/b"]


def test_a_dataset_is_built_verified_and_read_in_any_file_system(store: Store, tmp_path: Path) -> None:
    few = "synthetic:?count=6&classes=3"
    here, there = build_dataset(few, str(tmp_path / "here")), build_dataset(few, store.url)
    assert there.fingerprint == here.fingerprint
    assert verify(there) == []
    name = there.shard_name(0)
    assert store.read(name) == here.shard_store.read(name)
    assert build_dataset(store.url, f"{store.url}-again").samples == 6  # as a source


def test_tars_that_can_only_be_read_are_indexed_elsewhere(scenes: Dataset, tmp_path: Path) -> None:
    archive = open_store(f"archive://{scenes.shard_store.root}")
    with pytest.raises(UserError, match=r"can be read, but not written.*add --to"):
        index_shards(archive, find_shards(archive), archive, overwrite=True)
    index_shards(archive, find_shards(archive), open_store(str(tmp_path)), checksums=True)
    dataset = open_dataset(str(tmp_path))
    assert dataset.manifest.shards_url == archive.url
    assert verify(dataset) == []
    with pytest.raises(UserError, match="can be read, but not written"):
        archive.remove([scenes.shard_name(0)])


@pytest.mark.parametrize("url", ["hf://datasets/me/photos", "https://example.org/shards"])
def test_what_can_only_be_read_is_refused_as_a_destination_at_once(url: str) -> None:
    assert f"{url} can be read, but not written: " in refused("shards", "build", "synthetic:?count=1", url)
    with pytest.raises(UserError, match="can be read, but not written"):
        open_store(url).write("a", b"")


@pytest.mark.parametrize(
    ("url", "module", "words"),
    [
        ("hf://datasets/me/photos", "huggingface_hub", 'pip install "maestream[hf]"'),
        ("gs://bucket/photos", "gcsfs", 'pip install "maestream[gcs]"'),
        ("gcs://bucket/photos", "gcsfs", 'pip install "maestream[gcs]"'),
        ("az://container/photos", "adlfs", 'pip install "maestream[azure]"'),
        ("abfs://container@account.dfs.core.windows.net/photos", "adlfs", 'pip install "maestream[azure]"'),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    url: str, module: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(_registry, scheme_of(url), raising=False)
    monkeypatch.delitem(_registry, url.partition("://")[0], raising=False)
    message = refused("shards", "show", url)
    assert message.startswith(f"maestream: {url}: ")
    assert f"needs the package {module}" in message
    assert words in message


def test_urls_that_cannot_be_opened_are_one_message() -> None:
    assert "Protocol not known" in refused("shards", "show", "nope://bucket")
    for url in ("s3://", "s3://anonymous@", "gs:///"):
        assert "has no bucket name" in refused("shards", "show", url)


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("/data/photos", ""),
        ("photos", ""),
        ("C://", "c"),
        ("s3://bucket/a://b", "s3"),
        ("s3a://bucket", "s3"),
        ("gcs://bucket", "gs"),
        ("abfss://container@account.dfs.core.windows.net", "az"),
        ("https://host/a", "http"),
        ("simplecache::s3://bucket/a", "s3"),
    ],
)
def test_schemes(url: str, scheme: str) -> None:
    assert scheme_of(url) == scheme


def test_anonymous_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_NO_SIGN_REQUEST", raising=False)
    assert anonymous_url("s3://bucket/a@b") == "s3://anonymous@bucket/a@b"
    assert anonymous_url(anonymous_url("gs://bucket")) == "gs://anonymous@bucket"
    assert is_anonymous("s3://anonymous@bucket/a")
    assert not is_anonymous("s3://bucket/anonymous@a")
    for url, words in (
        ("data", "not for data"),
        ("az://c/a", "AZURE_STORAGE_ANON"),
        ("hf://datasets/a/b", "s3://"),
    ):
        with pytest.raises(UserError, match=words):
            anonymous_url(url)
    fs, root = open_file_system("s3://anonymous@bucket/a", 10)
    assert (fs.anon, root) == (True, "bucket/a")
    assert not open_file_system("s3://bucket/a", 10)[0].anon
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    assert open_file_system("s3://bucket/a", 10)[0].anon
    assert not is_anonymous("gs://bucket")
    assert absolute_url("s3://anonymous@bucket/a/") == "s3://anonymous@bucket/a"


def test_the_requester_pays_where_a_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_file_system("s3://bucket", 10)[0].req_kw == {}
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    assert open_file_system("s3://bucket", 10)[0].req_kw == {"RequestPayer": "requester"}
    assert "AWS_REQUEST_PAYER" in SETTINGS


class HttpError(Exception):
    """Stands for those of gcsfs, azure and the hub: not an OSError."""

    def __init__(self, status: int, where: str) -> None:
        super().__init__(f"answered {status}")
        setattr(self, where, status)


HttpError.__module__ = "gcsfs.retry"


@pytest.mark.parametrize("where", ["code", "status_code", "status"])
def test_answers_of_other_stores_are_retried_or_explained(where: str) -> None:
    for status in (408, 429, 500, 502, 503):
        assert faults.is_fault(HttpError(status, where))
    for status in (400, 401, 403, 404, 501):
        assert not faults.is_fault(HttpError(status, where))
    assert faults.is_beyond_end(HttpError(416, where))
    for status, scheme, words in (
        (403, "gs", "access denied.*GOOGLE_APPLICATION_CREDENTIALS"),
        (401, "az", "access denied.*AZURE_STORAGE_ACCOUNT_KEY"),
        (403, "hf", "access denied.*HF_TOKEN"),
        (500, "gs", "cannot read or write"),
    ):
        with pytest.raises(UserError, match=words), faults.as_user_error(f"{scheme}://bucket/a"):
            raise HttpError(status, where)
    with pytest.raises(FileNotFoundError), faults.as_user_error("gs://bucket/a"):
        raise HttpError(404, where)


def test_a_long_text_of_a_library_is_cut() -> None:
    with pytest.raises(UserError) as found, faults.as_user_error("az://container/a"):
        raise OSError("Server failed.\nContent: " + "<?xml …> " * 200)
    assert len(str(found.value)) < 500


def test_writing_to_a_bucket_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def put_file(*_: Any) -> None:
        raise FileNotFoundError("No such container")

    store = open_store("memory://bucket/a")
    monkeypatch.setattr(store.fs, "put_file", put_file)
    with pytest.raises(UserError, match="the bucket does not exist"):
        store.write("b", b"")


def test_gcsfs_says_forbidden_by_a_text() -> None:
    error = OSError("Forbidden: b/bucket/o denied")
    assert not faults.is_fault(error)
    with (
        pytest.raises(UserError, match=r"access denied.*GOOGLE_APPLICATION_CREDENTIALS"),
        faults.as_user_error("gs://b/a"),
    ):
        raise error


def test_a_body_that_is_cut_off_is_retried() -> None:
    error = aiohttp.ClientPayloadError("Response payload is not completed")
    error.__cause__ = ContentLengthError("Not enough data")  # it has a status, 400
    assert faults.is_fault(error)


def test_an_error_that_is_not_of_a_store_passes() -> None:
    for kind in (ZeroDivisionError, KeyError, NotImplementedError):
        with pytest.raises(kind), faults.as_user_error("gs://bucket/a"):
            raise kind


def test_no_message_has_a_signed_url() -> None:
    with pytest.raises(UserError) as found, faults.as_user_error("https://host/a?sig=abc"):
        raise ConnectionError("cannot reach https://host/a?X-Amz-Signature=abc&part=1")
    assert "abc" not in str(found.value)
