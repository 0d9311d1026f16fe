"""The contract suite, over every storage that there is, and over one that is added here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from contract.suite import StorageContract
from contract.toy import Toys, ToyStorage
from helpers.seaweed import BUCKET, Server

import kvmmap
from kvmmap.storage import registry
from kvmmap.storage.protocols import LayerStore, Storage

_numbers = itertools.count()


class TestMemory(StorageContract):
    persistent = False

    @pytest.fixture
    def place(self) -> Callable[[], Any]:
        return lambda: None


class TestFile(StorageContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Callable[[], Any]:
        return lambda: tmp_path / f"{next(_numbers)}.kvm"


class TestGroupInAFolder(StorageContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Callable[[], Any]:
        return lambda: tmp_path / f"{next(_numbers)}.zarr"


class TestGroupInMemory(StorageContract):
    @pytest.fixture
    def place(self) -> Callable[[], Any]:
        return lambda: f"memory://contract-suite-{next(_numbers)}"


class TestGroupInAnObjectStore(StorageContract):
    @pytest.fixture
    def place(self, s3: Server) -> Callable[[], Any]:
        return lambda: f"s3://{BUCKET}/contract/{next(_numbers)}.zarr"


WITH_RECENT = StorageContract.shape | {"recent_window": 16, "sinks": 3, "value_codec": "int4-rotated"}


class TestRecentRowsInMemory(TestMemory):
    shape = WITH_RECENT


class TestRecentRowsInAFile(TestFile):
    shape = WITH_RECENT


class TestRecentRowsInAGroup(TestGroupInAFolder):
    shape = WITH_RECENT


class TestRecentRowsInAnObjectStore(TestGroupInAnObjectStore):
    shape = WITH_RECENT


class TestToy(StorageContract):
    @pytest.fixture
    def place(self) -> Iterator[Callable[[], Any]]:
        toys = Toys()
        registry.register(toys)
        yield lambda: f"toy://{next(_numbers)}"
        registry.unregister(toys)

    def test_it_is_found_and_opened_as_others_are(self, place: Callable[[], Any]) -> None:
        path = place()
        with kvmmap.create(path, **self.shape) as cache:
            assert isinstance(cache.storage, ToyStorage)
        assert path in kvmmap.find("toy://")
        with kvmmap.open(path) as cache:
            assert cache.facts()["kind"] == "toy"
        with pytest.raises(kvmmap.NotACacheError, match="alone"):
            kvmmap.resize(path, 10)


def test_a_storage_implements_three_methods() -> None:
    """Everything else of the contract has a default."""
    assert LayerStore.__abstractmethods__ | Storage.__abstractmethods__ == {"rows", "write", "commit"}
