"""The file that a session appends to: the segment that the match ends with, a child of it, or a new one.

Appending in place needs the segment's writer lock, its very end, and room; else what follows is a child.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..cache import QuantizedKvCache
from ..errors import (
    CacheChangedError,
    CacheLockedError,
    CacheNotFoundError,
    FormatError,
    KvmmapError,
    NoCheckpointError,
    PositionOutOfRangeError,
)
from ..geometry import CacheGeometry
from ..metadata import document
from ..opening import open_cache, place_of
from ..storage.file.chain import ChainStorage
from ..storage.registry import CreateOptions
from .hashing import Prompt
from .index import Index, is_of, new_name
from .matching import Match
from .namespace import NOTES, Namespace
from .room import Room
from .segment import Segment, segment_path

COPIED_POSITIONS = 8
"""Positions of a segment that are copied rather than continued, if fewer of it are shared."""


class Vanished(Exception):  # noqa: N818  # a signal between these modules, and no error of a caller
    """A segment that was matched is gone, or is not what the index says: match again."""


class Tail(NamedTuple):
    """A file that is open for appending at the end of a match."""

    cache: QuantizedKvCache
    name: str
    parent: str | None
    start: int
    continues: bool


class Maker:
    """Opens tails.

    Args:
        folder: the library's.
        number: the library's; only its own segments are appended to.
        index: its index.
        lost: called with a segment whose file is gone.
        room: keeps the library's budget.
    """

    def __init__(self, folder: str, number: str, index: Index, lost: Callable[[Segment], None], room: Room) -> None:
        self._folder = folder
        self._number = number
        self._index = index
        self._lost = lost
        self._room = room

    def tail(
        self,
        namespace: Namespace,
        number: int,
        match: Match,
        prompt: Prompt,
        *,
        capacity: int,
        metadata: Mapping[str, Any],
        ttl: float | None,
    ) -> Tail:
        """Open what a session appends to.

        Args:
            namespace, number: the namespace and its number.
            match: what the library has.
            prompt: token ids.
            capacity: positions in all that there is to be room for.
            metadata: of a new segment.
            ttl: of a new segment.

        Raises:
            Vanished: match again.
            KvmmapError, OSError: as in `create` and `open`.
        """
        last = match.segment
        if last is not None and last.stop == match.length and is_of(last.name, self._number):
            tail = self._continue(last, prompt, match.length, capacity)
            if tail is not None:
                return tail
        return self._new(namespace, number, match, prompt, capacity, metadata, ttl)

    def _continue(self, last: Segment, prompt: Prompt, length: int, capacity: int) -> Tail | None:
        """Append to the last segment in place; None where that can't be."""
        try:
            cache = open_cache(last.path, "a", record_use=False)
        except CacheLockedError:
            return None
        except (CacheNotFoundError, FormatError) as error:
            raise self._vanished(last, error) from None
        try:
            if not cache.seq_len == cache.token_len == length or cache.capacity < capacity:
                cache.close()
                return None
            self._compare(cache, last, prompt, length)
            if not self._index.begin_writing(last.name):
                raise Vanished
        except BaseException:
            cache.close()
            raise
        return Tail(cache, last.name, last.parent, last.start, True)

    def _new(
        self,
        namespace: Namespace,
        number: int,
        match: Match,
        prompt: Prompt,
        capacity: int,
        metadata: Mapping[str, Any],
        ttl: float | None,
    ) -> Tail:
        name = new_name(self._number)
        path = segment_path(self._folder, namespace.folder, name)
        below, start = self._place(match, namespace)
        source = match.segment if start == match.length else below
        # The index names the segment before its file exists, so that no process evicts the parent, and so that another
        # process finds the file if this one dies.
        if self._index.add(name, number, parent=below.id if below else 0, start=start, size=0, ttl=ttl) is None:
            raise Vanished
        try:
            with contextlib.ExitStack() as stack:
                self._room.reserve(name, namespace.fixed_bytes)
                cache = self._create(path, namespace, source, start, capacity, notes_of(namespace, metadata))
                stack.callback(cache.close)
                if start < match.length:
                    self._copy(cache, match, start)
                if match.segment is not None:
                    self._compare(cache, match.segment, prompt, match.length)
                if below is not None and not isinstance(cache.storage, ChainStorage):
                    # The chain was as long as it may be, so its first positions were copied.
                    self._index.set_whole(name)
                    below, start = None, 0
                stack.pop_all()
        except BaseException:
            self._remove(path, name)
            raise
        return Tail(cache, name, below.name if below else None, start, False)

    @staticmethod
    def _place(match: Match, namespace: Namespace) -> tuple[Segment | None, int]:
        """Return what a new segment continues, and its first own position."""
        last = match.segment
        if last is None:
            return None, 0
        if match.length - last.start < COPIED_POSITIONS and not namespace.states and not namespace.recent_window:
            # Too little to keep another's segment for, such as what a chat template puts before each turn.
            return (match.chain[-2] if len(match.chain) > 1 else None), last.start
        if match.length == last.start:
            return match.chain[-2], last.start  # of the last one, only the checkpoint where it begins is needed
        return last, match.length

    def _create(
        self,
        path: str,
        namespace: Namespace,
        source: Segment | None,
        start: int,
        capacity: int,
        metadata: Mapping[str, Any],
    ) -> QuantizedKvCache:
        """Make a file that begins with the first positions of a segment."""
        # Nothing of it counts before it is committed, and its name is random, so it need not be durable before.
        place, options = place_of(path), CreateOptions(durable=False)
        notes = document(metadata, namespace.model)
        if source is None:
            geometry = CacheGeometry.build(**namespace.shape(capacity))
            return QuantizedKvCache.of_storage(place.create(geometry, notes, options))
        try:
            return QuantizedKvCache.of_storage(place.create_child(source.path, start, capacity, notes, options))
        except (CacheNotFoundError, CacheChangedError, FormatError, PositionOutOfRangeError) as error:
            raise self._vanished(source, error) from None
        except NoCheckpointError as error:  # it was replaced, or dropped, since the index was told
            self._index.set_checkpoints(source.name, error.expected or ())
            raise Vanished from None

    def _copy(self, cache: QuantizedKvCache, match: Match, start: int) -> None:
        """Copy positions from `start` on of what matched."""
        last = match.chain[-1]
        try:
            with open_cache(last.path, record_use=False) as old:
                for layer, source in zip(cache.layers, old.layers, strict=True):
                    if layer.geometry.has_rows:
                        layer.extend_quantized(*source.read_quantized(start, match.length))
                cache.push_token_ids(old.token_ids[start : match.length])
        except (CacheNotFoundError, CacheChangedError, FormatError, PositionOutOfRangeError) as error:
            raise self._vanished(last, error) from None

    def _compare(self, cache: QuantizedKvCache, last: Segment, prompt: Prompt, length: int) -> None:
        """Compare the token ids of an opened cache, which its checksums cover, with the prompt's."""
        if cache.seq_len < length or not np.array_equal(cache.token_ids[:length], prompt.ids[:length]):
            self._index.mark_broken(last.name, "its token ids are not those that the index has")
            raise Vanished

    def _vanished(self, segment: Segment, error: KvmmapError) -> Vanished:
        """Record that a segment is gone or damaged; return what to raise."""
        if isinstance(error, FormatError | PositionOutOfRangeError):
            self._index.mark_broken(segment.name, str(error))
        elif isinstance(error, CacheNotFoundError) and not os.path.exists(segment.path):
            self._lost(segment)
        return Vanished()

    def _remove(self, path: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._index.remove(name)


def notes_of(namespace: Namespace, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a new segment: from it alone the index can be rebuilt."""
    return {**metadata, NOTES: {"namespace": namespace.document}}
