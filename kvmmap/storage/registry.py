"""The kinds of storage: each registers itself, and says which paths and URLs are its own.

A kind is a module that calls `register`. It finds the `Place` that a path means, and a place creates, opens, removes
and replaces the cache there. Code that opens or copies caches asks here, and does not know which kinds there are.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import FormatError, NotACacheError
from ..geometry import CacheGeometry
from ..metadata import Document
from ..paths import is_url
from .protocols import Durability, Storage, Verify
from .receiving import CopyOptions, Incoming, Receiver


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """Arguments of `kvmmap.create`, whatever storage makes the cache."""

    durability: Durability = "publish"
    overwrite: bool = False
    timeout: float = 0
    metadata_room: int | None = None
    compressor: str | None = None
    break_lock: bool = False
    durable: bool = True
    """False: nothing is synced before the first commit of a file, which makes the file and its name durable. After a
    power loss before that, its bytes may be anything. The name must be one that no other process ever uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """Arguments of `kvmmap.open`, whatever storage has the cache."""

    mode: Literal["r", "a"] = "r"
    timeout: float = 0
    durability: Durability = "publish"
    recover: bool = False
    verify: Verify = "read"
    break_lock: bool = False
    cache_bytes: int | None = None
    record_use: bool = True


class Place(ABC):
    """Where a cache is, or may be made. Nothing is looked up before a method is called.

    Args:
        url: path or URL, as messages and users call it.
    """

    file_path: str | None = None
    """Path of the cache if it is one file, which `resize`, `fork` and `repair` work on; else None."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def open(self, options: OpenOptions) -> Storage:
        """Open the cache, in constant time. Raises as `kvmmap.open`."""

    @abstractmethod
    def create(self, geometry: CacheGeometry, document: Document, options: CreateOptions) -> Storage:
        """Make an empty cache and open it for appending. Raises as `kvmmap.create`."""

    def create_child(
        self,
        parent: str,
        length: int | None,
        capacity: int | None,
        document: Document | None,
        options: CreateOptions,
    ) -> Storage:
        """Make a cache that begins with the first positions of another one, and open it for appending.

        Args:
            parent: path of the other one's file.
            length: positions of it; all that are committed if None.
            capacity: positions to reserve, those of the parent included; the parent's if None.
            document: model and metadata; the parent's if None.
            options: as in `create`.

        Raises:
            FormatError: this kind of storage has no such caches.
        """
        raise FormatError(f"{self.url}: only a .kvm file can continue another cache: copy that one here", path=self.url)

    @abstractmethod
    def remove(self, *, timeout: float = 0, break_lock: bool = False) -> None:
        """Delete the cache, unless a writer has it open. Raises as `kvmmap.remove`."""

    @contextlib.contextmanager
    def replace(self, geometry: CacheGeometry, document: Document, options: CreateOptions) -> Iterator[Storage]:
        """Make a cache that is filled in the block, and counts when the block ends; nothing is left of it otherwise."""
        storage = self.create(geometry, document, options)
        try:
            yield storage
            storage.close()
        except BaseException:
            storage.close()
            self.remove()
            raise

    def receive(self, incoming: Incoming, options: CopyOptions) -> Receiver:
        """Make, or continue, the target of a copy. Raises as `kvmmap.copy`."""
        refuse_compressor(options.compressor, self.url)
        storage = self.create(incoming.geometry, incoming.document, CreateOptions(overwrite=options.overwrite))
        return _NewReceiver(storage, incoming, self)


class _NewReceiver(Receiver):
    """The target of a copy that can't be continued."""

    def __init__(self, storage: Storage, incoming: Incoming, place: Place) -> None:
        super().__init__(storage, incoming)
        self._place = place

    def cancel(self) -> None:
        super().cancel()
        self._place.remove()


class StorageKind(Protocol):
    """A kind of storage."""

    def locate(self, path: str, options: Mapping[str, Any] | None) -> Place | None:
        """Return the place that a path or URL means; None if it is not this kind's.

        Args:
            path: as `paths.place_text` returns it.
            options: `storage_options`.
        """

    def has_name(self, name: str, *, folder: bool) -> bool:
        """True if a file, or folder, of this name is taken for a cache when a folder is searched."""

    def find(self, url: str, options: Mapping[str, Any] | None) -> Iterator[str] | None:
        """Return the caches below a URL; None if it is not this kind's."""


_kinds: list[StorageKind] = []


def register(kind: StorageKind) -> None:
    """Make a kind of storage known. It is asked before those that were registered earlier."""
    _kinds.insert(0, kind)


def unregister(kind: StorageKind) -> None:
    """Forget a kind of storage."""
    _kinds.remove(kind)


def place_at(path: str, options: Mapping[str, Any] | None = None) -> Place:
    """Return the place that a path or URL means.

    Args:
        path: as `paths.place_text` returns it.
        options: `storage_options`.

    Raises:
        NotACacheError: no kind of storage takes it.
    """
    for kind in _kinds:
        if place := kind.locate(path, options):
            return place
    raise NotACacheError(f"{path}: no storage takes such a path or URL", path=path)


def caches_below(url: str, options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Return the caches below a URL.

    Raises:
        NotACacheError: no kind of storage can list it.
    """
    for kind in _kinds:
        if (found := kind.find(url, options)) is not None:
            return found
    raise NotACacheError(f"{url}: no storage takes such a URL" if is_url(url) else f"{url}: is no URL", path=url)


def has_cache_name(name: str, *, folder: bool) -> bool:
    """True if a file, or folder, of this name is taken for a cache when a folder is searched."""
    return any(kind.has_name(name, folder=folder) for kind in _kinds)


def refuse_compressor(compressor: str | None, url: str) -> None:
    """Raise FormatError for a storage that does not compress."""
    if compressor is not None:
        raise FormatError(f"{url}: a .kvm file is mapped, and so can't be compressed; a .zarr group can", path=url)
