"""One layer of a `.kvm` file that is appended to: rows are written with `pwrite`, and read through the map.

What may be written when, and what makes it durable, is the writer's business.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ... import _core
from ...codecs import COMPILED
from ...geometry import LayerGeometry
from ...ranges import check_room
from ...recent import RecentRows
from ..protocols import Rows
from .committer import Committer
from .live_record import LiveRecord
from .mapped_file import MappedFile
from .reader_layer import MappedLayer
from .recent_records import SAVED_TOGETHER
from .snapshot import SnapshotHolder

SCRATCH_BYTES = 2 * 1024 * 1024
"""Rows are quantised and written in parts of at most this size: codes stay in the cache, and parts are few. In
positions it is a power of two, so that parts of a prompt start and end where large pages do. Appending a prompt of bf16
is some 12 % faster than in parts of a quarter of it (medians, on a loaded machine)."""


class ScratchRows:
    """Rows to quantise into. Layers of one shape share them.

    Args:
        capacity: positions that the cache has room for.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._found: dict[LayerGeometry, tuple[Rows, Rows]] = {}

    def of(self, geometry: LayerGeometry) -> tuple[Rows, Rows]:
        """Return rows for many positions of a layer, and those of the first alone."""
        if geometry not in self._found:
            fitting = 1 << (max(SCRATCH_BYTES // geometry.position_bytes, 1).bit_length() - 1)
            count = min(fitting, self._capacity)  # none at capacity 0, of a position that may be gigabytes
            rows = Rows.empty(geometry, count)
            self._found[geometry] = rows, rows.part(0, 1)
        return self._found[geometry]


class WriterLayer(MappedLayer):
    """One layer's slabs, written with `pwrite` and read through the map."""

    _storage: Committer

    def __init__(
        self, storage: Committer, index: int, mapped: MappedFile, holder: SnapshotHolder, scratch: ScratchRows
    ) -> None:
        super().__init__(storage, index, mapped, holder)
        self._row_bytes = self.geometry.slab_bytes(1)
        self._live: LiveRecord | None = mapped.live
        self._scratch_rows = scratch
        self._scratch: tuple[Rows, Rows] | None = None
        self._unsaved: tuple[int, int] | None = None
        """Positions [start, stop) whose rows in 16 bits are in memory alone."""
        self._pushed: tuple[Rows, list[Rows]] | None = None
        """Coded rows of the last positions that were pushed, by their number modulo SAVED_TOGETHER, and views of each:
        records have digests of them, and in the map they would be read from pages that no one else has touched yet."""
        self._pushes: tuple[int, int] = -1, -1
        """Positions [start, stop), pushed one by one, of which `_pushed` has the last."""

    def begin(self, count: int) -> int:
        self._storage.check_writable()
        length = self.length
        if length + count > self._storage.admitted:
            check_room(length, count, self.capacity, layer=self.index)
            self._storage.ask_admission(length + count)
        return length

    def stage(self, start: int, count: int) -> Rows:
        if self._scratch is None:
            # Made when the first rows come: a file may declare positions of gigabytes, and opening it must not need
            # them.
            self._scratch = self._scratch_rows.of(self.geometry)
        scratch, one = self._scratch
        if count == 1:
            pushed = self._pushed
            if pushed is None:
                if self._records is None or SAVED_TOGETHER * self.geometry.position_bytes > SCRATCH_BYTES:
                    return one
                pushed = self._pushed = self._allocate_pushed()
            return pushed[1][start % SAVED_TOGETHER]
        return scratch if count >= len(scratch[0]) else scratch.part(0, count)

    def _allocate_pushed(self) -> tuple[Rows, list[Rows]]:
        rows = Rows.empty(self.geometry, SAVED_TOGETHER)
        return rows, [rows.part(row, row + 1) for row in range(SAVED_TOGETHER)]

    def write(self, start: int, rows: Rows) -> None:
        at, size = self._offsets, self._row_bytes
        if len(at) == 4:  # as of int8; a loop would be a tenth of what a position costs
            a, b, c, d = at
            i, j, k, m = size
            offsets: tuple[int, ...] = (a + start * i, b + start * j, c + start * k, d + start * m)
        else:
            offsets = tuple([offset + start * row for offset, row in zip(at, size, strict=True)])
        self._mapped.file.write(offsets, rows)

    def make_step(self, tensor: type, dtypes: tuple[Any, Any, Any]) -> _core.Step | None:
        if self.geometry.key_codec not in COMPILED or self.geometry.value_codec not in COMPILED:
            return None
        shape, recent = self.geometry, self.recent
        keys, values = shape.key_codec, shape.value_codec
        rings = () if recent is None else (recent.window, recent.sinks, *recent.ring.parts, *recent.first.parts)
        codecs = keys.id, keys.transform, values.id, values.transform
        dims = shape.num_kv_heads, shape.head_dim, shape.value_head_dim
        return _core.Step(codecs, *dims, self._offsets, rings, tensor, dtypes)

    def write_step(self, step: _core.Step, position: int, keys: Any, values: Any) -> bool:
        if self._records is not None and self._loaded is None:
            super().recent_rows()
        written = self._mapped.file.write_step(step, position, keys, values)
        if written and self._records is not None:
            self._note_unsaved(position, position + 1)
        return written

    def write_bytes(self, start: int, array: int, offset: int, data: Any) -> None:
        """Write bytes of one of the arrays, from byte `offset` of the array's part from position `start` on, and
        start writing them to the disk. As with `write`, they are not part of the layer yet."""
        file, at = self._mapped.file, self._offsets[array] + start * self._row_bytes[array] + offset
        file.write((at,), (data,))
        file.start_sync(at, len(data))

    def start_sync(self, start: int, stop: int) -> None:
        """Start writing stored positions to the disk, before the next commit waits for it."""
        for low, high in self.byte_ranges(start, stop):
            self._mapped.file.start_sync(low, high - low)

    # Rows in 16 bits

    def recent_rows(self) -> RecentRows | None:
        """What the file has is read once; from then on, what is appended is in memory already."""
        return self.recent if self._loaded is not None else super().recent_rows()

    def keep(self, start: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int) -> None:
        recent = self._recent if self._loaded is not None else super().recent_rows()
        assert recent is not None
        recent.keep(start, keys, key_dtype, values, value_dtype)
        if keys.ndim == 3:
            self._note_unsaved(start, start + len(keys))
            return
        stop = start + 1
        pushes = self._pushes
        self._pushes = (pushes[0] if pushes[1] == start else start), stop  # as `stage` has it
        unsaved = self._unsaved
        self._unsaved = (start if unsaved is None else unsaved[0]), stop
        if not stop % SAVED_TOGETHER:
            self.save_recent()

    def take_recent(self, source: RecentRows, start: int, stop: int, at: int = 0) -> None:
        if self._records is not None:
            if self._loaded is None:
                super().recent_rows()
            super().take_recent(source, start, stop, at)
            self._note_unsaved(at, at + stop - start)

    def forget_recent(self, length: int) -> None:
        self._pushes = -1, -1
        if self._loaded is not None:
            super().forget_recent(length)
        if self._unsaved is not None:
            start, stop = min(self._unsaved[0], length), min(self._unsaved[1], length)
            self._unsaved = (start, stop) if start < stop else None
        if self.recent is not None and self._loaded is not None and length:
            # Slots that truncated positions had taken are empty now; their records may still be those before.
            stop = length if self._unsaved is None else self._unsaved[1]
            self._unsaved = max(0, length - self.recent.window), stop

    def _note_unsaved(self, start: int, stop: int) -> None:
        self._pushes = -1, -1
        if self._unsaved is not None:
            start = min(start, self._unsaved[0])
        self._unsaved = start, stop
        if stop - start >= SAVED_TOGETHER:
            self.save_recent()

    @property
    def has_unsaved_recent(self) -> bool:
        return self._unsaved is not None

    def save_recent(self) -> None:
        """Write the rows in 16 bits that are in memory alone, and empty the slots whose record was torn; a commit makes
        this durable.

        Raises:
            OSError: the disk is full or failing.
        """
        recent, records, file = self.recent, self._records, self._mapped.file
        if recent is None or records is None:
            return
        for record in self._torn:
            record.empty(file)
        self._torn = []
        if self._unsaved is not None:
            start, stop = self._unsaved
            first, pushed = start - start % SAVED_TOGETHER, self._pushed
            if pushed and self._pushes[0] <= start and self._pushes[1] == stop <= first + SAVED_TOGETHER:
                records.save(recent, pushed[0], first, start, stop, file)
            else:
                records.save(recent, self.slabs(), 0, start, stop, file)
            self._unsaved = None

    def settle_recent(self) -> None:
        """As `save_recent`, and look for torn records if none were read yet: before the file counts as closed."""
        if self._records is not None:
            if self._loaded is None:
                super().recent_rows()
            self.save_recent()

    def forget_map(self) -> None:
        super().forget_map()
        self._live = None

    def publish(self, length: int) -> None:
        if length < self.length:
            self.forget_recent(length)
        live = self._live or self._mapped.live
        try:
            live.publish(self.index, length)
            self.length = length
        except BaseException:  # Ctrl-C between the two
            self._storage.interrupt()
            raise
