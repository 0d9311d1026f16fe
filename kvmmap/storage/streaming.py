"""Stream rows from one storage into another without buffering them: a specialisation between pairs of storages.

It is no part of the storage contract. A layer store that can deliver its rows as bytes has `stream_bytes`; one that can
write such bytes in place has `write_bytes`. Copies use the pair where both are there, and rows otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from .protocols import LayerStore

WriteBytes = Callable[[int, int, Any], None]
"""Writes bytes of rows. Takes the number of an array of `Rows`, the offset in that array's bytes, and the bytes, which
are valid until it returns. Called by several threads."""


class RowStream(Protocol):
    """Rows that are transferred from a source to a target. They are not verified before `finish`."""

    def finish(self) -> bool:
        """Wait for the end; return True if all rows arrived and match their checksums. On False, what was written is
        to be overwritten with rows read by `iter_rows`, which raises an error that names the damaged block."""

    def cancel(self) -> None:
        """Cancel. Nothing is written after this returns."""


@runtime_checkable
class StreamSource(Protocol):
    """A layer store that can deliver rows as bytes."""

    def stream_bytes(self, start: int, stop: int, write: WriteBytes) -> RowStream | None:
        """Start delivering stored positions [start, stop); None if they have to be read as rows."""


@runtime_checkable
class StreamTarget(Protocol):
    """A layer store that can write bytes of rows in place."""

    def write_bytes(self, start: int, array: int, offset: int, data: Any) -> None:
        """Write bytes of one array of `Rows`, from `offset` on in the bytes of positions from `start` on. As with
        `write`, they are not part of the layer before `publish`."""


def open_stream(source: LayerStore, start: int, stop: int, target: LayerStore, position: int) -> RowStream | None:
    """Start streaming positions [start, stop) to `position` of a target; None if the two storages can't."""
    if isinstance(source, StreamSource) and isinstance(target, StreamTarget):
        return source.stream_bytes(start, stop, functools.partial(target.write_bytes, position))
    return None
