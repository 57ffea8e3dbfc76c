"""Datasets in a bucket of a real S3 server, and its errors as a user sees them."""

import os

import numpy as np
import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.storage.store import open_store
from tests.support.command_line import refused
from tests.support.data.loaders import make_loader
from tests.support.datasets import build_dataset

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def remote(s3: str) -> Dataset:
    return build_dataset("synthetic:?count=70&classes=7", f"{s3}/scenes")


def test_a_bucket_holds_the_same_dataset(remote: Dataset, scenes: Dataset) -> None:
    assert remote.fingerprint == scenes.fingerprint
    assert verify(remote) == []
    assert sorted(remote.store.names()) == sorted(scenes.store.names())


def test_batches_from_a_bucket_are_those_from_a_folder(remote: Dataset, scenes: Dataset) -> None:
    for here, there in zip(make_loader(scenes).steps(2, 9), make_loader(remote).steps(2, 9), strict=True):
        assert (here.images == there.images).all()
        assert (here.sample_ids == there.sample_ids).all()


def test_ranged_reads_are_exact_and_past_the_end_an_error(remote: Dataset) -> None:
    name = remote.shard_name(0)
    whole = remote.store.read(name)
    rng = np.random.default_rng(0)
    for start, end in np.sort(rng.integers(0, len(whole), (20, 2))):
        assert remote.store.read_range(name, int(start), int(end - start)) == whole[start:end]
    with pytest.raises(UserError, match="shorter than the manifest says"):
        remote.store.read_range(name, len(whole) - 10, 11)
    with pytest.raises(UserError, match="shorter than the manifest says"):
        remote.store.read_range(name, len(whole) + 10, 11)
    with pytest.raises(FileNotFoundError):
        remote.store.read_range("shard-999999.tar", 0, 10)


def test_an_unfinished_build_in_a_bucket_can_be_overwritten(remote: Dataset, s3: str) -> None:
    store = open_store(f"{s3}/half")
    for name in ("building.json", "shard-000000.tar", "shard-000099.tar", "index/shard-000099.parquet"):
        store.write(name, b"half")
    with pytest.raises(UserError, match="unfinished build"):
        open_dataset(store.url)
    with pytest.raises(UserError, match="--overwrite to start over"):
        build_dataset("synthetic:?count=70&classes=7", store.url)
    dataset = build_dataset("synthetic:?count=70&classes=7", store.url, overwrite=True)
    assert sorted(store.names()) == sorted(remote.store.names())
    assert verify(dataset) == []


def test_errors_of_a_bucket_are_one_line(remote: Dataset, s3: str) -> None:
    assert "the bucket does not exist" in refused("shards", "show", "s3://no-such-bucket/data")
    assert "the bucket does not exist" in refused(
        "shards", "build", "synthetic:?count=1", "s3://no-such-bucket/x"
    )
    assert "the bucket does not exist" in refused("shards", "build", "s3://no-such-bucket/x", f"{s3}/x")
    assert "not a dataset" in refused("shards", "show", f"{s3}/nothing/here")
    assert "no such file or folder" in refused("shards", "build", f"{s3}/nothing/here", f"{s3}/x")
    assert "has no bucket name" in refused("shards", "show", "s3://")
    for words in (("show", f"{s3}/scenes"), ("build", "synthetic:?count=1", f"{s3}/x")):
        message = refused("shards", *words, AWS_SECRET_ACCESS_KEY="wrong-key-1234")
        assert "access denied" in message
        assert "AWS_SECRET_ACCESS_KEY" in message
        assert "wrong-key-1234" not in message
    secure = os.environ["AWS_ENDPOINT_URL"].replace("http:", "https:")
    for endpoint in ("http://127.0.0.1:9", "localhost:9000", secure):
        message = refused("shards", "show", f"{s3}/scenes", AWS_ENDPOINT_URL=endpoint)
        assert "Check AWS_ENDPOINT_URL" in message
