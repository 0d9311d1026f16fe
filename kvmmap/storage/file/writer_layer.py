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
from .first_read import FirstReads
from .live_record import LiveRecord
from .mapped_file import MappedFile
from .reader_layer import MappedLayer
from .recent_records import SAVED_TOGETHER
from .snapshot import SnapshotHolder

SCRATCH_BYTES = 2 * 1024 * 1024
"""Rows are quantised and written in parts of at most this size: codes stay in the cache, and parts are few. In
positions it is a power of two, so that parts of a prompt start and end where large pages do. Appending a prompt of bf16
is some 12 % faster than in parts of a quarter of it (medians, on a loaded machine)."""


_NONE = 1 << 62
"""A position that there is none of."""


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
        self,
        storage: Committer,
        index: int,
        mapped: MappedFile,
        holder: SnapshotHolder,
        first_reads: FirstReads,
        scratch: ScratchRows,
    ) -> None:
        super().__init__(storage, index, mapped, holder, first_reads)
        self._row_bytes = self.geometry.slab_bytes(1)
        self._live: LiveRecord | None = mapped.live
        self._scratch_rows = scratch
        self._scratch: tuple[Rows, Rows] | None = None
        self._unsaved_from = _NONE
        """From this position on the file does not have the rows in 16 bits yet; at most the length between appends, and
        `_NONE` until those of the file are read."""
        self._pushed: tuple[Rows, list[Rows]] | None = None
        """Coded rows of positions that were appended one by one, by their number modulo SAVED_TOGETHER, and views of
        each: records have digests of them, and in the map they would be read from pages that no one else has touched
        yet."""
        self._pushed_from = 0
        """From this position on `_pushed` has all that were appended, as far as it reaches back."""
        self._appender: _core.PositionAppender | None = None

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
            pushed = self._pushed_rows()
            return one if pushed is None else pushed[1][start % SAVED_TOGETHER]
        return scratch if count >= len(scratch[0]) else scratch.part(0, count)

    def _pushed_rows(self) -> tuple[Rows, list[Rows]] | None:
        """Return `_pushed`, made when it is first needed; None if nothing needs it, or it would be large."""
        if (
            self._pushed is None
            and self._records is not None
            and SAVED_TOGETHER * self.geometry.position_bytes <= SCRATCH_BYTES
        ):
            rows = Rows.empty(self.geometry, SAVED_TOGETHER)
            self._pushed = rows, [rows.part(row, row + 1) for row in range(SAVED_TOGETHER)]
        return self._pushed

    def write(self, start: int, rows: Rows) -> None:
        at, size = self._offsets, self._row_bytes
        if len(at) == 4:  # as of int8; a loop would be a tenth of what a position costs
            a, b, c, d = at
            i, j, k, m = size
            offsets: tuple[int, ...] = (a + start * i, b + start * j, c + start * k, d + start * m)
        else:
            offsets = tuple([offset + start * row for offset, row in zip(at, size, strict=True)])
        pushed = self._pushed
        if pushed is None or rows is not pushed[1][start % SAVED_TOGETHER]:
            self._pushed_from = start + len(rows[0])
        self._mapped.file.write(offsets, rows)

    @property
    def appends_positions(self) -> bool:
        shape = self.geometry
        return shape.has_rows and shape.key_codec in COMPILED and shape.value_codec in COMPILED

    def append_position(
        self, position: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int
    ) -> int:
        appender = self._appender
        if appender is None:
            rings = None if self._records is None else self._load().rings
            appender = self._appender = _core.PositionAppender(*self._compiled_shape(), rings, self._encoded_rows())
        try:
            bad = self._mapped.file.write_by(appender.append, position, keys, key_dtype, values, value_dtype)
        except BaseException:
            self._pushed_from = position  # its row in `_pushed` may hold anything
            raise
        if bad != -1:
            self._pushed_from = position
        elif not (position + 1) % SAVED_TOGETHER:  # nothing else to note: `_unsaved_from` is not above the length
            self._pass_multiple(1, position + 1)
        return bad

    def make_step(self, tensor: type, dtypes: tuple[Any, Any, Any]) -> _core.Step | None:
        if not self.appends_positions:
            return None
        rings, window = None, 0
        if self.recent is not None:
            rings, window = self.recent.rings, self.recent.window
        return _core.Step(*self._compiled_shape(), rings, window, self._encoded_rows(), tensor, dtypes)

    def write_step(self, step: _core.Step, position: int, keys: Any, values: Any) -> bool:
        if self._loaded is None and self._records is not None:
            self._load()
        try:
            written = self._mapped.file.write_by(step.append, position, keys, values)
        except BaseException:
            self._pushed_from = position
            raise
        if not written:
            self._pushed_from = position
        elif self._records is not None:
            self._note_kept(position, position + 1)
        return written

    def _compiled_shape(self) -> tuple[tuple[int, int, int, int], int, int, int, list[int]]:
        """Return what compiled functions take of a layer: codecs, KV heads, dimensions, offsets in the file."""
        shape = self.geometry
        keys, values = shape.key_codec, shape.value_codec
        codecs = keys.id, keys.transform, values.id, values.transform
        return codecs, shape.num_kv_heads, shape.head_dim, shape.value_head_dim, self._offsets

    def _encoded_rows(self) -> Rows:
        """Return rows for one position after the other to be encoded into."""
        pushed = self._pushed_rows()
        return self._scratch_rows.of(self.geometry)[1] if pushed is None else pushed[0]

    def write_bytes(self, start: int, array: int, offset: int, data: Any) -> None:
        """Write bytes of one of the arrays, from byte `offset` of the array's part from position `start` on, and
        start writing them to the disk. As with `write`, they are not part of the layer yet."""
        self._pushed_from = _NONE
        file, at = self._mapped.file, self._offsets[array] + start * self._row_bytes[array] + offset
        file.write((at,), (data,))
        file.start_sync(at, len(data))

    def start_sync(self, start: int, stop: int) -> None:
        """Start writing stored positions to the disk, before the next commit waits for it."""
        for low, high in self.byte_ranges(start, stop):
            self._mapped.file.start_sync(low, high - low)

    # Rows in 16 bits

    def recent_rows(self) -> RecentRows | None:
        return None if self._records is None else self._load()

    def _load(self) -> RecentRows:
        """Return `recent`: what the file has is read once; from then on, what is appended is in memory already."""
        if self._loaded is None:
            super().recent_rows()
        recent = self._recent
        assert recent is not None
        return recent

    def _load_recent(self, length: int, generation: int) -> None:
        # First: once they count as read, another thread may append.
        self._unsaved_from = min(self._unsaved_from, length)
        super()._load_recent(length, generation)

    def keep(self, start: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int) -> None:
        self._load().keep(start, keys, key_dtype, values, value_dtype)
        self._note_kept(start, start + (len(keys) if keys.ndim == 3 else 1))

    def take_recent(self, source: RecentRows, start: int, stop: int, at: int = 0) -> None:
        if self._records is not None:
            self._load()
            super().take_recent(source, start, stop, at)
            self._pushed_from = max(self._pushed_from, at + stop - start)
            self._note_kept(at, at + stop - start)

    def forget_recent(self, length: int) -> None:
        self._pushed_from = length
        if self.recent is not None and self._loaded is not None:
            super().forget_recent(length)
            # Slots that truncated positions had taken are empty now; their records may still be those before.
            self._unsaved_from = min(self._unsaved_from, max(0, length - self.recent.window))

    def _note_kept(self, start: int, stop: int) -> None:
        """Note that positions [start, stop) are in memory in 16 bits; they may not be published yet."""
        if start < self._unsaved_from:
            self._unsaved_from = start
        if start // SAVED_TOGETHER != stop // SAVED_TOGETHER:
            self._pass_multiple(stop - start, stop)

    def _pass_multiple(self, count: int, stop: int) -> None:
        """Write records, if they are due, when an append of `count` positions up to `stop` has passed a multiple of
        SAVED_TOGETHER."""
        records = self._records
        if records is not None and (count >= SAVED_TOGETHER or records.is_due(stop - self._unsaved_from)):
            try:
                self._save_recent(stop)
            except BaseException:
                self.forget_recent(stop - count)  # they do not become part of the layer
                raise

    @property
    def has_unsaved_recent(self) -> bool:
        return self._unsaved_from < self.length

    def save_recent(self) -> None:
        """Write the rows in 16 bits that are in memory alone, and empty the slots whose record was torn; a commit makes
        this durable.

        Raises:
            OSError: the disk is full or failing.
        """
        self._save_recent(self.length)

    def _save_recent(self, stop: int) -> None:
        """As `save_recent`, of positions below `stop`."""
        recent, records, file = self.recent, self._records, self._mapped.file
        if recent is None or records is None:
            return
        for record in self._torn:
            record.empty(file)
        self._torn = []
        start = self._unsaved_from
        if start < stop:
            first, pushed = start - start % SAVED_TOGETHER, self._pushed
            if pushed is not None and self._pushed_from <= start and stop <= first + SAVED_TOGETHER:
                records.save(recent, pushed[0], first, start, stop, file)
            else:
                records.save(recent, self.slabs(), 0, start, stop, file)
            self._unsaved_from = stop

    def settle_recent(self) -> None:
        """As `save_recent`, and look for torn records if none were read yet: before the file counts as closed."""
        if self._records is not None:
            self._load()
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
