"""A Zarr group as the target of a copy: filled in place, committed now and then, and marked as unfinished meanwhile."""

from __future__ import annotations

import contextlib

import numpy as np

from ...errors import CacheExistsError, CacheNotFoundError, CorruptCacheError, FormatError
from ..objects.protocol import Objects
from ..protocols import Progress, VerifyReport
from ..receiving import CopyOptions, Incoming, Receiver
from .handle import read_root
from .placement import create_group, open_locked
from .writer import ZarrWriter

COMMIT_BYTES = 512 * 2**20
"""A commit follows after so many bytes: an interrupted copy repeats at most as many."""


class GroupReceiver(Receiver):
    """Appends rows to a group, whose writer stores them in threads of its own.

    Args:
        writer: of the group.
        incoming: what comes.
    """

    def __init__(self, writer: ZarrWriter, incoming: Incoming) -> None:
        super().__init__(writer, incoming)
        self._writer = writer
        self.compares = incoming.same_blocks

    @classmethod
    def begin(cls, objects: Objects, incoming: Incoming, options: CopyOptions) -> GroupReceiver:
        """Open the group of an interrupted copy, or make one."""
        continuing = False
        with contextlib.suppress(CacheNotFoundError, FormatError):  # creating one finds out what is there
            present = read_root(objects)[0]
            continuing = present.copying == incoming.stamp
            if f"{present.cache_id}/{present.generation}" == incoming.source.identity():
                raise CacheExistsError(
                    f"{objects.url}: is the source itself, and would be lost before it is copied: name another place",
                    path=objects.url,
                )
        if continuing:
            writer = open_locked(objects, keep_copying=True, break_lock=options.break_lock)
            if writer.seq_len > incoming.length:
                writer.truncate(incoming.length)
        else:
            writer = create_group(
                objects,
                incoming.geometry,
                incoming.document,
                compressor=options.compressor,
                overwrite=options.overwrite,
                break_lock=options.break_lock,
                copying=incoming.stamp,
            )
        return cls(writer, incoming)

    def stored(self, length: int) -> None:
        writer, incoming = self._writer, self.incoming
        committed = writer.root.seq_len
        if length == incoming.length or (length - committed) * incoming.position_bytes >= COMMIT_BYTES:
            writer.store_rows(length)
            if self.compares:
                self._compare(committed, length)
            writer.commit()

    def _compare(self, start: int, stop: int) -> None:
        """Compare stored blocks with the checksums that the source has of them."""
        source, size = self.incoming.source, self.incoming.geometry.block_tokens
        committed = source.committed_len
        last = -(-stop // size) if stop == committed else min(stop, committed) // size
        if last <= start // size:
            return
        expected = source.committed_checksums(start // size, last)
        found = self._writer.sums_below(stop)[start // size : last]
        for block, layer in zip(*np.nonzero(expected != found), strict=True):
            position = (start // size + int(block)) * size
            raise CorruptCacheError(
                f"{source.path}: layer {layer} is damaged in positions [{position}, {min(position + size, stop)}): "
                "checksum does not match; the copy ends before",
                path=source.path,
                layer=int(layer),
                position=position,
            )

    def complete(self) -> None:
        """Commit checkpoints; `stored` has committed everything else."""
        self._writer.commit()

    def verify(self, progress: Progress | None) -> VerifyReport:
        return self._writer.verify(progress)

    def place(self) -> str:
        self._writer.copying = None
        self._writer.close()
        return self._writer.path

    def cancel(self) -> None:
        self._writer.abandon()  # as of its last commit
