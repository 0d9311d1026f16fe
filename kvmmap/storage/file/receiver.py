"""A file as the target of a copy: filled beside its path by threads of its own, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

from ...errors import CacheNotFoundError, FormatError
from ...format import block_checksum
from ..posix import PosixFile
from ..protocols import Progress, Rows, VerifyReport
from ..receiving import CopyOptions, CopyRange, Incoming, Receiver
from ..streaming import RowStream, open_stream
from ..temporary import partial_path
from .hashed_copy import copy_hashed
from .placement import METADATA_ROOM, place_file, place_of, remove_file
from .reader import MappedReader
from .reader_layer import MappedLayer
from .verify import verify_file
from .writer import MappedWriter
from .writer_layer import WriterLayer

WRITERS = 2
"""Threads that write."""

BACKLOG_BYTES = 64 * 2**20
"""Rows that may wait for these."""


class FileReceiver(Receiver):
    """Writes rows in threads while the caller waits for the next, and starts writing them to the disk at once.

    Rows that the source can stream are written by the threads that receive them: each piece is hashed and written
    while it is in the processor's cache, and the whole is never in memory.

    Rows of another file are copied within the kernel, and shared on the disk where the file system can. Complete blocks
    are read back and compared with the source's checksums while they are in the processor's cache.

    Args:
        writer: of the partial file.
        incoming: what comes.
        path: where the file is to stand.
        options: of the copy.
    """

    def __init__(self, writer: MappedWriter, incoming: Incoming, path: str, options: CopyOptions) -> None:
        super().__init__(writer, incoming)
        self._writer = writer
        self._partial = writer.path
        self._path = path
        self._overwrite = options.overwrite
        source = incoming.source
        self._file = source.file if isinstance(source, MappedReader) and not source.file.closed else None
        """The source's file, if its rows are copied within the kernel."""
        if not (options.verify and incoming.same_blocks and incoming.length == source.committed_len):
            self._file = None
        self.compares = self._file is not None
        self._copies: dict[CopyRange, Future[None]] = {}
        self._sound: set[tuple[int, int]] = set()
        """(layer, block) that were read back after copying, and are those of the source's checksums."""
        self._sums = (
            source.committed_checksums(0, -(-incoming.length // writer.geometry.block_tokens))
            if self.compares
            else None
        )
        self._layers = [cast(WriterLayer, layer) for layer in writer.layers]  # those without rows are not copied
        self._pool = ThreadPoolExecutor(WRITERS)
        self._streams: dict[CopyRange, RowStream] = {}
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    @classmethod
    def begin(cls, path: str, incoming: Incoming, options: CopyOptions) -> FileReceiver:
        """Open the partial file of an interrupted copy, or make one."""
        path = place_of(path, overwrite=options.overwrite)
        writer = _open_partial(partial_path(path, incoming.stamp), incoming)
        return cls(writer, incoming, path, options)

    def expect(self, part: CopyRange) -> None:
        if self._file is not None and isinstance(part.source, MappedLayer):
            self._copies[part] = self._pool.submit(self._copy, self._file, part.source, part)
            return
        stream = open_stream(part.source, part.start, part.stop, self._layers[part.layer], part.position)
        if stream is None:
            super().expect(part)
        else:
            self._streams[part] = stream

    def _copy(self, file: PosixFile, source: MappedLayer, part: CopyRange) -> None:
        """Copy a range, and note which of its complete blocks have the source's checksums when they are read back."""
        assert self._sums is not None
        target, size, count = self._layers[part.layer], self._writer.geometry.block_tokens, part.stop - part.start
        lead = min(-part.position % size, count)  # of a block that an interrupted copy has begun
        digests = []
        for (start, stop), (at, _), row in zip(
            source.byte_ranges(part.start, part.stop),
            target.byte_ranges(part.position, part.position + count),
            source.geometry.slab_bytes(1),
            strict=True,
        ):
            begin = lead * row
            self._writer.file.copy_from(file, start, at, begin)
            digests.append(
                copy_hashed(file, self._writer.file, start + begin, at + begin, stop - start - begin, size * row)
            )
            self._writer.file.start_sync(at, stop - start)
        for block, found in enumerate(zip(*digests, strict=True), (part.position + lead) // size):
            if block_checksum(part.layer, block, size, found) == int(self._sums[block, part.layer]):
                self._sound.add((part.layer, block))
        self._writer.write_sketches_ahead(part.layer, (part.position + count) // size, source.kept_sketches)

    def has(self, part: CopyRange) -> bool:
        if part in self._copies:
            self._copies.pop(part).result()
            return True
        stream = self._streams.get(part)
        sound = stream is not None and stream.finish()
        self._streams.pop(part, None)  # only now: until then it may have to be cancelled
        if sound:  # others are still in flight
            stop = part.position + part.stop - part.start
            self._writer.write_sketches_ahead(part.layer, stop // self._writer.geometry.block_tokens)
        return sound

    def put(self, layer: int, start: int, rows: Rows) -> None:
        """Start writing; wait if there is much to write already."""
        size = sum(array.nbytes for _, array in rows.named())
        self._pending.append((size, self._pool.submit(self._write, layer, start, rows)))
        self._bytes += size
        while self._bytes > BACKLOG_BYTES and len(self._pending) > 1:
            self._wait_for_one()

    def _write(self, layer: int, start: int, rows: Rows) -> None:
        self._layers[layer].write(start, rows)
        self._layers[layer].start_sync(start, start + rows.num_positions)

    def _wait_for_one(self) -> None:
        size, writing = self._pending.popleft()
        self._bytes -= size
        writing.result()

    def wait(self) -> None:
        while self._pending:
            self._wait_for_one()

    def complete(self) -> None:
        self._end_threads()
        incoming, writer = self.incoming, self._writer
        if incoming.same_blocks and incoming.length == incoming.source.committed_len:
            size = incoming.geometry.block_tokens
            sums = incoming.source.committed_checksums(writer.committed_len // size, -(-incoming.length // size))
            writer.use_checksums(incoming.length, sums)
        writer.close()

    def verify(self, progress: Progress | None) -> VerifyReport:
        with contextlib.closing(MappedReader.open(self._partial)) as reader:
            report = verify_file(reader.mapped, reader.holder, reader.seq_len, progress, self._sound)
        if self._file is not None:
            # Rows that were damaged before are reported as the source's.
            for damage in report.damages:
                if damage.layer is not None and damage.start is not None and damage.stop is not None:
                    self.incoming.source.layers[damage.layer].rows(damage.start, damage.stop)
        return report

    def place(self) -> str:
        place_file(self._partial, self._path, overwrite=self._overwrite)
        return self._path

    def cancel(self) -> None:
        self._end_threads()
        self._writer.close()

    def _end_threads(self) -> None:
        for stream in self._streams.values():
            stream.cancel()
        self._copies.clear()
        self._pool.shutdown(cancel_futures=True)


def _open_partial(partial: str, incoming: Incoming) -> MappedWriter:
    try:
        writer = MappedWriter.open_locked(partial, timeout=0)
        if writer.geometry == incoming.geometry and writer.seq_len <= incoming.length:
            return writer
        writer.close()
        remove_file(partial, 0)
    except CacheNotFoundError:
        pass
    except FormatError:
        os.unlink(partial)  # only copies give files such names
    room = max(METADATA_ROOM, len(incoming.document.encode()))
    return MappedWriter.create(partial, incoming.geometry, incoming.document, metadata_room=room)
