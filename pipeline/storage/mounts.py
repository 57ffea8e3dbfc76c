"""Several folders or buckets that are read as one.

    mounts:{"": "/data/a", "b": "s3://bucket/b"}      b/x.tar is s3://bucket/b/x.tar; all other names are in /data/a

The tars of a mix, and of a dataset that was extended, are in such places. The URL goes to other processes like any other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.storage.store import Store, open_store

SCHEME = "mounts:"


@dataclass(frozen=True)
class Mounts(Store):
    """Reads files from one of several stores: the one that the first folder of a name tells, "" for all other names."""

    stores: Mapping[str, Store]

    def at(self, name: str) -> tuple[Store, str]:
        """The store of a file, and its name there."""
        first, slash, rest = name.partition("/")
        return (self.stores[first], rest) if slash and first in self.stores else (self.stores[""], name)

    @property
    def is_local(self) -> bool:
        return all(store.is_local for store in self.stores.values())

    def describe(self, name: str = "") -> str:
        if not name:
            return ", ".join(store.url for store in self.stores.values())
        store, name = self.at(name)
        return store.describe(name)

    def read(self, name: str) -> bytes:
        store, name = self.at(name)
        return store.read(name)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        store, name = self.at(name)
        return store.read_range(name, start, size)

    def read_into(self, name: str, start: int, memory: memoryview) -> None:
        store, name = self.at(name)
        store.read_into(name, start, memory)

    def size(self, name: str) -> int:
        store, name = self.at(name)
        return store.size(name)

    def exists(self, name: str) -> bool:
        store, name = self.at(name)
        return store.exists(name)

    def write(self, name: str, data: bytes) -> None:
        raise UserError(f"{self.describe(name)} belongs to another dataset, whose tars are not written to")


def mounts_url(urls: Mapping[str, str]) -> str:
    """The URL for `open_tars` of the URLs of several folders, by the first folder of the names in each."""
    return SCHEME + json.dumps(dict(urls))


def open_tars(url: str, already_reached: bool = False) -> Store:
    """Open the folder of a dataset's tars; arguments and errors as `open_store`. The URL may be one of `mounts_url`."""
    if not url.startswith(SCHEME):
        return open_store(url, already_reached)
    stores = {
        name: open_store(place, already_reached) for name, place in json.loads(url[len(SCHEME) :]).items()
    }
    first = next(iter(stores.values()))
    return Mounts(url, first.fs, first.root, stores)
