"""Zarr groups as a kind of storage: `.zarr` directories, and URLs of object stores. Zarr itself is not loaded here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import NotACacheError
from ...geometry import CacheGeometry
from ...metadata import Document
from ...paths import is_url
from ...ranges import index
from ..objects.protocol import Objects
from ..protocols import Storage
from ..receiving import CopyOptions, Incoming, Receiver
from ..registry import CreateOptions, OpenOptions, Place, register

if TYPE_CHECKING:
    from .writer import ZarrWriter


class GroupPlace(Place):
    """A place for a Zarr group.

    Args:
        objects: where its objects are.
    """

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects.url)
        self.objects = objects

    def open(self, options: OpenOptions) -> Storage:
        from .placement import open_locked
        from .reader import ZarrReader
        from .shard_cache import CACHE_BYTES

        room = CACHE_BYTES if options.cache_bytes is None else index(options.cache_bytes, "cache_bytes")
        if options.mode == "r":
            return ZarrReader.open(self.objects, cache_bytes=room)
        return open_locked(
            self.objects,
            timeout=options.timeout,
            break_lock=options.break_lock,
            durability=options.durability,
            cache_bytes=room,
        )

    def create(self, geometry: CacheGeometry, document: Document, options: CreateOptions) -> Storage:
        return self._create(geometry, document, options)

    def _create(
        self, geometry: CacheGeometry, document: Document, options: CreateOptions, copying: str | None = None
    ) -> ZarrWriter:
        from .placement import create_group

        return create_group(
            self.objects,
            geometry,
            document,
            durability=options.durability,
            overwrite=options.overwrite,
            timeout=options.timeout,
            compressor=options.compressor,
            break_lock=options.break_lock,
            copying=copying,
        )

    def remove(self, *, timeout: float = 0, break_lock: bool = False) -> None:
        from .placement import remove_group

        remove_group(self.objects, timeout=timeout, break_lock=break_lock)

    @contextlib.contextmanager
    def replace(self, geometry: CacheGeometry, document: Document, options: CreateOptions) -> Iterator[Storage]:
        """Fill a group that its root calls unfinished until the block ends."""
        writer = self._create(geometry, document, options, copying="new")
        try:
            yield writer
            writer.copying = None
            writer.close()
        except BaseException:
            writer.abandon()
            self.remove()
            raise

    def receive(self, incoming: Incoming, options: CopyOptions) -> Receiver:
        from .receiver import GroupReceiver

        objects = self.objects if options.durable else self.objects.without_sync()
        return GroupReceiver.begin(objects, incoming, options)


class Groups:
    """The kind of storage that Zarr groups are."""

    def locate(self, path: str, options: Mapping[str, Any] | None) -> GroupPlace | None:
        if is_url(path):
            if path.rstrip("/").endswith(".kvm"):
                raise NotACacheError(
                    f"{path}: a .kvm file is mapped, and so must be local; in object stores caches are .zarr groups "
                    "(kvmmap.copy() makes one of a file, kvmmap.fetch() the other way round)",
                    path=path,
                )
            from ..objects.remote import objects_at

            return GroupPlace(objects_at(path, options))
        named = path.rstrip("/").endswith(".zarr") and not os.path.isfile(path)
        if named or os.path.isfile(os.path.join(path, "zarr.json")):
            from ..objects.local import FolderObjects

            return GroupPlace(FolderObjects(path))
        return None

    def has_name(self, name: str, *, folder: bool) -> bool:
        return folder and name.endswith(".zarr")

    def find(self, url: str, options: Mapping[str, Any] | None) -> Iterator[str] | None:
        from ..objects.remote import groups_below

        return groups_below(url, options) if is_url(url) else None


register(Groups())
