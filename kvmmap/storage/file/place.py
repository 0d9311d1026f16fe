"""`.kvm` files as a kind of storage: any path on this machine that is no other kind's.

Opening a file for reading is what most programs do, and for a command all that it does. What else there is, writing,
chains and copies, is imported when it is first used, since it takes as long to load as reading does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...geometry import CacheGeometry
from ...metadata import Document
from ...paths import is_url
from ..protocols import Storage
from ..receiving import CopyOptions, Incoming, Receiver
from ..registry import CreateOptions, OpenOptions, Place, refuse_compressor, register
from ..temporary import partial_path
from .placement import METADATA_ROOM, place_file, place_of, remove_file
from .reader import MappedReader

if TYPE_CHECKING:
    from .writer import MappedWriter


class FilePlace(Place):
    """A path of a `.kvm` file."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.file_path: str = path

    def open(self, options: OpenOptions) -> Storage:
        own: MappedReader
        if options.mode == "r":
            own = MappedReader.open(
                self.file_path, recover=options.recover, verify=options.verify, record_use=options.record_use
            )
        else:
            from .writer import MappedWriter

            own = MappedWriter.open_locked(
                self.file_path,
                timeout=options.timeout,
                durability=options.durability,
                recover=options.recover,
                verify=options.verify,
                record_use=options.record_use,
            )
        if own.parent is None:
            return own
        from .child import open_chain

        return open_chain(own, verify=options.verify, record_use=options.record_use)

    def create(self, geometry: CacheGeometry, document: Document, options: CreateOptions) -> MappedWriter:
        from .writer import MappedWriter

        refuse_compressor(options.compressor, self.url)
        return MappedWriter.create(
            self.file_path,
            geometry,
            document,
            durability=options.durability,
            overwrite=options.overwrite,
            timeout=options.timeout,
            metadata_room=METADATA_ROOM if options.metadata_room is None else options.metadata_room,
            durable=options.durable,
        )

    def create_child(
        self,
        parent: str,
        length: int | None,
        capacity: int | None,
        document: Document | None,
        options: CreateOptions,
    ) -> Storage:
        from .child import create_child

        refuse_compressor(options.compressor, self.url)
        return create_child(
            self.file_path,
            parent,
            length,
            capacity=capacity,
            document=document,
            durability=options.durability,
            overwrite=options.overwrite,
            timeout=options.timeout,
            metadata_room=METADATA_ROOM if options.metadata_room is None else options.metadata_room,
            durable=options.durable,
        )

    def remove(self, *, timeout: float = 0, break_lock: bool = False) -> None:
        remove_file(self.file_path, timeout)

    @contextlib.contextmanager
    def replace(self, geometry: CacheGeometry, document: Document, options: CreateOptions) -> Iterator[Storage]:
        """Fill a file beside the path, which takes the path when the block ends."""
        from .writer import MappedWriter

        refuse_compressor(options.compressor, self.url)
        place = place_of(self.file_path, overwrite=options.overwrite)
        partial = partial_path(place)
        room = max(METADATA_ROOM, len(document.encode()))
        storage = MappedWriter.create(partial, geometry, document, metadata_room=room)
        try:
            with contextlib.closing(storage):
                yield storage
            place_file(partial, place, overwrite=options.overwrite)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise

    def receive(self, incoming: Incoming, options: CopyOptions) -> Receiver:
        from .receiver import FileReceiver

        refuse_compressor(options.compressor, self.url)
        return FileReceiver.begin(self.file_path, incoming, options)


class Files:
    """The kind of storage that `.kvm` files are."""

    def locate(self, path: str, options: Mapping[str, Any] | None) -> FilePlace | None:
        return None if is_url(path) else FilePlace(path)

    def has_name(self, name: str, *, folder: bool) -> bool:
        # Names that begin with a dot are temporary files.
        return not folder and name.endswith(".kvm") and not name.startswith(".")

    def find(self, url: str, options: Mapping[str, Any] | None) -> None:
        """Files have no URLs."""


register(Files())
