"""The target side of a copy: what a storage may do better than to append the rows that come.

A copy calls, for each range of positions, `expect` some time before, then `has`, and `put` unless that is true; after
all layers of a step it calls `wait`, publishes the step, and calls `stored`. At the end it calls `put_checkpoints` and
`complete`, then `verify` if that was asked for, and `place`. When a copy fails, `cancel` is called in place of the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..geometry import CacheGeometry
from ..metadata import Document
from .checkpoints import copy_checkpoints
from .protocols import LayerStore, Progress, Rows, Storage, VerifyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """What the caller of a copy asks for."""

    overwrite: bool = False
    """Replace a cache that is there already."""

    verify: bool = True
    """Read the copy back and compare it with its checksums before it counts as complete."""

    compressor: str | None = None
    """Compressor of a Zarr group; None for none."""

    durable: bool = True
    """The copy survives power loss on return."""

    break_lock: bool = False
    """Take the lock of an object store from a writer that is certainly gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """What a copy transfers."""

    source: Storage
    geometry: CacheGeometry
    """Geometry of the copy."""

    length: int
    """Positions to copy."""

    stamp: str
    """24 hexadecimal digits; the same for as long as the copied positions begin the same, so that an interrupted copy
    can be continued."""

    states: Sequence[int] | None = None
    """The source's states, by index, that are the copy's; None for all."""

    same_blocks: bool
    """True if the blocks of the copy have the checksums that they have in the source."""

    @property
    def document(self) -> Document:
        """Model and metadata."""
        return self.source.document

    @property
    def position_bytes(self) -> int:
        """Bytes of one position, all layers."""
        return sum(layer.position_bytes for layer in self.geometry.layers)


class CopyRange(NamedTuple):
    """Positions of one layer that are copied in one step."""

    source: LayerStore
    start: int
    """In the source."""
    stop: int
    layer: int
    """In the target."""
    position: int
    """Where `start` is in the target."""

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales."""
        return (self.stop - self.start) * self.source.geometry.position_bytes


class Receiver:
    """The target of a copy.

    Args:
        storage: open for appending; it may hold what an interrupted copy has brought.
        incoming: what comes.
    """

    compares = False
    """True if `stored` compares what it has stored with the source's checksums, so that the copy need not."""

    def __init__(self, storage: Storage, incoming: Incoming) -> None:
        self.storage = storage
        self.incoming = incoming

    def expect(self, part: CopyRange) -> None:
        """Start fetching a range that will be copied soon."""
        part.source.prefetch(part.start, part.stop)

    def has(self, part: CopyRange) -> bool:
        """True if the rows of an expected range are in the target already."""
        return False

    def put(self, layer: int, start: int, rows: Rows) -> None:
        """Write rows of a layer."""
        self.storage.layers[layer].write(start, rows)

    def wait(self) -> None:
        """Wait until rows that were put need not stay as they are. Raises OSError for what could not be written."""

    def stored(self, length: int) -> None:
        """Called after the positions below `length` were published."""

    def put_checkpoints(self) -> None:
        """Copy the checkpoints of the source, once all rows are stored."""
        incoming = self.incoming
        copy_checkpoints(incoming.source.checkpoints, self.storage.checkpoints, incoming.length, incoming.states)

    def complete(self) -> None:
        """Called when everything was stored."""
        self.storage.commit()

    def verify(self, progress: Progress | None) -> VerifyReport:
        """Read the copy back and compare it with its checksums."""
        return self.storage.verify(progress)

    def place(self) -> str:
        """Make the copy count, close it, and return its path or URL."""
        assert self.storage.path is not None
        self.storage.close()
        return self.storage.path

    def cancel(self) -> None:
        """Release everything. What was committed stays, if the same copy can continue it."""
        self.storage.close()
