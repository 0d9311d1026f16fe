"""What a storage is: the protocols that layers and caches are written against.

An append goes: `begin` (may I, and is there room), then `stage` and `write` as often as it takes, then `publish`.
Nothing is visible, to anyone, before `publish`.

A read goes: `mark`, then the length, then rows, then `check_since(mark)`, in this order. Other threads may push,
truncate, refresh and close through the same handle meanwhile; who lowers lengths changes the mark afterwards, and
writes over rows only then. So a length that belongs to another mark than the rows, or rows that were written over,
are found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..geometry import CacheGeometry, LayerGeometry
from ..metadata import Document

Verify = Literal["read", "open", "none"]
"""When rows are compared with their checksums without being asked: each block when it is first read through a handle;
all when a file is opened that was not closed before the machine went down; or not."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Take = Callable[[int, int, Any], None]
"""Takes bytes of rows: in which array of `Rows` they lie, where in its bytes they start, and the bytes, valid until it
returns. Called by several threads."""


class Rows(NamedTuple):
    """A stretch of positions of one layer: codes int8 [n, num_kv_heads, dim], scales f32 [n, num_kv_heads]."""

    key_codes: NDArray[np.int8]
    key_scales: NDArray[np.float32]
    value_codes: NDArray[np.int8]
    value_scales: NDArray[np.float32]

    @classmethod
    def allocate(cls, geometry: LayerGeometry, count: int) -> Rows:
        """Make zeroed rows for `count` positions."""
        heads = geometry.num_kv_heads
        return cls(
            np.zeros((count, heads, geometry.head_dim), np.int8),
            np.zeros((count, heads), np.float32),
            np.zeros((count, heads, geometry.value_head_dim), np.int8),
            np.zeros((count, heads), np.float32),
        )

    def part(self, start: int, stop: int) -> Rows:
        """Views of positions [start, stop)."""
        return Rows(
            self.key_codes[start:stop],
            self.key_scales[start:stop],
            self.value_codes[start:stop],
            self.value_scales[start:stop],
        )

    def named(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield each array with its name."""
        yield from zip(self._fields, self, strict=True)

    def fill(self, source: Rows) -> None:
        """Copy rows of the same shapes in."""
        np.copyto(self.key_codes, source.key_codes)
        np.copyto(self.key_scales, source.key_scales)
        np.copyto(self.value_codes, source.value_codes)
        np.copyto(self.value_scales, source.value_scales)


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that `verify` found wrong."""

    what: str
    """In words."""

    layer: int | None = None
    """The layer, if it is in one."""

    start: int | None = None
    """First position of the damaged block, if it is in one."""

    stop: int | None = None
    """One past its last committed position."""


@dataclass(slots=True)
class VerifyReport:
    """What `verify` looked at, and found."""

    path: str | None
    """The cache's path; None in memory."""

    seq_len: int
    """Positions stored."""

    verified: int
    """Positions, from 0, that checksums cover: those of the last commit. The rest is published and has none yet."""

    blocks: int = 0
    """Blocks looked at, over all layers and the token ids; the incomplete last one counts."""

    bytes: int = 0
    """Bytes of codes, scales and token ids looked at."""

    damages: list[Damage] = field(default_factory=list)
    """Empty if all is well."""

    @property
    def sound(self) -> bool:
        """True if nothing is damaged."""
        return not self.damages


class Pouring(Protocol):
    """Rows on their way through, from a storage that does not have them in memory to whoever takes them."""

    def finish(self) -> bool:
        """Wait until all went by; False if they were not sound, or could not be had so. Then what was taken counts for
        nothing, and `stretches` has them, or says what is wrong."""

    def abandon(self) -> None:
        """Let it be; nothing is handed on any more when this returns."""


class LayerStore(Protocol):
    """One layer's slabs."""

    @property
    def index(self) -> int: ...

    @property
    def geometry(self) -> LayerGeometry: ...

    @property
    def capacity(self) -> int: ...

    @property
    def length(self) -> int:
        """Positions stored, as this handle sees them."""

    @property
    def in_memory(self) -> bool:
        """True where any rows can be had as views at no cost; else they come, and are best taken, in stretches."""

    def begin(self, count: int) -> int:
        """Check that `count` positions may be appended, and return the position of the first."""

    def stage(self, start: int, count: int) -> Rows:
        """Give room to quantise at most `count` positions from `start` on into; it may hold fewer, never none."""

    def write(self, start: int, rows: Rows) -> None:
        """Put rows, staged ones or others of the right shapes, where they belong. They are not part of the layer
        before `publish`; others than staged ones must stay as they are until the next commit."""

    def publish(self, length: int) -> None:
        """Make everything below `length` part of the layer."""

    def slabs(self) -> Rows:
        """Read-only views of the whole capacity (of what there is of it); a copy where rows do not lie in memory."""

    def rows(self, start: int, stop: int) -> Rows:
        """Return stored positions [start, stop), read-only: views where they lie in one piece, else a copy."""

    def stretches(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield stored positions [start, stop) piece by piece, as they lie; later ones may be fetched meanwhile."""

    def stream(self, start: int, stop: int) -> Iterator[Rows]:
        """As `stretches`, and what is behind takes no memory any more: a stretch is to be used before the next."""

    def is_proven(self, stop: int) -> bool:
        """True if stored positions [0, stop) may be read from `slabs` as they are: `prove` would compare nothing."""

    def prove(self, ranges: NDArray[np.int64]) -> None:
        """Stored positions are about to be read from `slabs`, [k, 2] of (start, stop): see that their blocks match
        their checksums, where that was not seen before. `rows`, `stretches` and `stream` do so themselves.

        Raises:
            CorruptCacheError: one does not.
        """

    def expect(self, start: int, stop: int) -> None:
        """Stored positions [start, stop) will be read soon: start fetching them, where that takes its time."""

    def pour(self, start: int, stop: int, take: Take) -> Pouring | None:
        """Start handing stored positions [start, stop) on as they come, before it is known that they are sound; None
        where rows lie in memory, or have to pass through it."""

    def release(self, start: int, stop: int) -> None:
        """Stored positions [start, stop) won't be read soon: give their memory back, where they can be read again."""

    def mark(self) -> int:
        """What `check_since` is to compare with; taken before the length is looked at."""

    def check_since(self, mark: int) -> None:
        """Raise if what was read since a mark can't be trusted: the storage was closed, or rows were taken back."""

    def sketches(self, blocks: int, mark: int) -> list[NDArray[np.uint16]]:
        """Return the sketches of the first `blocks` blocks, all complete under a mark, as `storage.sketches` says: in
        pieces that follow one another; not to be written to."""

    def check(self) -> None:
        """Raise if the storage was closed, or rows that this handle counts on were taken back."""


class Storage(Protocol):
    """All layers' slabs, with what belongs to the cache as a whole."""

    @property
    def geometry(self) -> CacheGeometry: ...

    @property
    def path(self) -> str | None: ...

    @property
    def writable(self) -> bool: ...

    @property
    def closed(self) -> bool: ...

    @property
    def lock(self) -> AbstractContextManager[Any, Any]:
        """Held around every append; an append by another thread waits for it."""

    @property
    def layers(self) -> Sequence[LayerStore]: ...

    @property
    def token_len(self) -> int:
        """Positions, from 0, whose token ids are recorded."""

    @property
    def document(self) -> Document:
        """Metadata as it stands."""

    def mark(self) -> int:
        """As a layer's."""

    def check_since(self, mark: int) -> None:
        """As a layer's."""

    def check(self) -> None:
        """As a layer's."""

    def set_document(self, document: Document) -> None:
        """Replace the metadata; part of the next commit."""

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None: ...

    def publish_tokens(self, length: int) -> None: ...

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        """Return a copy of the first `count` recorded ids."""

    def publish_step(self, length: int) -> None:
        """Make everything below `length` part of every layer, or, if that is cut off (Ctrl-C), of none."""

    def appended(self) -> None:
        """Called after an append was published; commits if the storage is to commit every one."""

    def commit(self) -> None: ...

    def truncate(self, length: int) -> None: ...

    def refresh(self) -> bool: ...

    def close(self) -> None: ...

    def verify(self, progress: Progress | None = None) -> VerifyReport: ...

    @property
    def committed_len(self) -> int:
        """Positions that checksums cover."""

    def committed_sums(self, first: int, stop: int) -> NDArray[np.uint64]:
        """Return the checksums of blocks [first, stop), u64 [stop - first, num_layers]; the last may be incomplete."""

    def check_rows(self, start: int, stop: int) -> None:
        """Raise CorruptCacheError if a committed block of [start, stop) does not match its checksum, unless reading
        rows does so anyway."""

    def identity(self) -> str | None:
        """Name the cache in its present generation: while it stays, what is committed does. None in memory."""

    def facts(self) -> dict[str, Any]:
        """What `inspect` shows of the storage itself."""


def seq_len(storage: Storage) -> int:
    """Positions complete in every layer."""
    return min([layer.length for layer in storage.layers])


def publish_level(storage: Storage, length: int) -> None:
    """Publish a length in every layer; if that is cut off, take it back where it was published."""
    try:
        for layer in storage.layers:
            layer.publish(length)
    except BaseException:
        storage.truncate(seq_len(storage))
        raise
