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
    PositionOutOfRangeError,
)
from ..opening import create, open_cache
from ..storage.file.child import MAX_FILES
from .hashing import Prompt
from .index import Index, is_of, new_name
from .matching import Match
from .namespace import NOTES, Namespace
from .segment import Segment, segment_path


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
    """

    def __init__(self, folder: str, number: str, index: Index, lost: Callable[[Segment], None]) -> None:
        self._folder = folder
        self._number = number
        self._index = index
        self._lost = lost

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
        last, name = match.segment, new_name(self._number)
        path = segment_path(self._folder, namespace.folder, name)
        # A chain that would get too long is copied into one file.
        parent = last if last is not None and len(match.chain) < MAX_FILES else None
        start = 0 if parent is None else match.length
        # The index has the segment before it is made: nobody evicts its parent, and if this process dies, somebody
        # looks for the file.
        number_of_parent = 0 if parent is None else parent.id
        if self._index.add(name, number, parent=number_of_parent, start=start, size=0, ttl=ttl) is None:
            raise Vanished
        try:
            with contextlib.ExitStack() as stack:
                notes = notes_of(namespace, metadata, None if parent is None else parent.name, start)
                if last is None:
                    cache = create(path, **namespace.shape(capacity), metadata=notes, model=namespace.model)
                else:
                    try:
                        cache = create(
                            path,
                            parent=last.path,
                            parent_length=match.length,
                            capacity=capacity,
                            metadata=notes,
                            model=namespace.model,
                        )
                    except (CacheNotFoundError, CacheChangedError, FormatError, PositionOutOfRangeError) as error:
                        raise self._vanished(last, error) from None
                stack.callback(cache.close)
                if last is not None:
                    self._compare(cache, last, prompt, match.length)
                stack.pop_all()
        except BaseException:
            self._remove(path, name)
            raise
        return Tail(cache, name, None if parent is None else parent.name, start, False)

    def _compare(self, cache: QuantizedKvCache, last: Segment, prompt: Prompt, length: int) -> None:
        """Compare the token ids of an opened cache, which its checksums cover, with the prompt's."""
        if cache.seq_len < length or not np.array_equal(cache.token_ids[:length], prompt.ids[:length]):
            self._index.mark_broken(last.name, "its token ids are not those that the index has")
            raise Vanished

    def _vanished(self, segment: Segment, error: KvmmapError) -> Vanished:
        """Record that a segment is gone or damaged; return what to raise."""
        if isinstance(error, FormatError):
            self._index.mark_broken(segment.name, str(error))
        elif isinstance(error, CacheNotFoundError) and not os.path.exists(segment.path):
            self._lost(segment)
        return Vanished()

    def _remove(self, path: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._index.remove(name)


def notes_of(namespace: Namespace, metadata: Mapping[str, Any], parent: str | None, start: int) -> dict[str, Any]:
    """Return the metadata of a new segment: from it alone the index can be rebuilt."""
    return {**metadata, NOTES: {"namespace": namespace.document, "parent": parent, "start": start}}
