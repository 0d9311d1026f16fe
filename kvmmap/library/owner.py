"""The calls of a session to its library: it needs room, it has committed, it is closed."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from .contents import NO_TOKEN_ID, disk_bytes, read_own_tokens
from .hashing import Prompt
from .index import Contents, Index
from .matching import Search
from .metrics import Metrics
from .room import Room
from .session import Session


class SessionOwner:
    """The library's side of sessions. It works on after the library's handle was closed.

    Args:
        folder: the library's.
        index: its index.
        room: keeps its budget.
        metrics: counts.
        ttl: of new segments.
        committed: called when a segment was committed and closed.
    """

    def __init__(
        self, folder: str, index: Index, room: Room, metrics: Metrics, ttl: float | None, committed: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._index = index
        self._room = room
        self._metrics = metrics
        self._ttl = ttl
        self._committed = committed

    def reserve(self, session: Session, size: int) -> None:
        """Make room for bytes that are about to be appended."""
        self._room.reserve(session.name, size)

    def evict_for(self, session: Session, size: int) -> bool:
        """Evict so many bytes, the disk being full; False if nothing could go."""
        return bool(self._room.evict(max(size, 1), keep=session.name))

    def has(self, session: Session) -> bool:
        """Look for all positions of a session of which nothing is in the index, and its checkpoints, in segments."""
        number = self._index.namespace_id(session.namespace.digest)
        ids = session.token_ids
        if number is None or np.any(ids == NO_TOKEN_ID):
            return False
        stops = {len(ids)}
        if session.states:
            stops |= {found.position for found in session.checkpoints if found.position > session.reused}
        seed = session.namespace.seed
        return all(
            Search(self._index, number, Prompt(seed, ids[:stop]), read_own_tokens).run().length == stop
            for stop in stops
        )

    def record(self, session: Session, contents: Contents) -> None:
        """Name what was committed in the index."""
        if self._index.set_contents(session.name, contents):
            return
        # The index was rebuilt meanwhile, and files that are being written are left out.
        namespace = session.namespace
        number = self._index.add_namespace(
            namespace.digest,
            namespace.folder,
            namespace.document,
            namespace.model.name or "",
            namespace.position_bytes,
        )
        parent = self._index.segment(session.parent) if session.parent else None
        if session.parent and parent is None:
            return  # `check` finds the file, and says what is missing
        self._index.add(
            session.name,
            number,
            parent=parent.id if parent else 0,
            start=session.start,
            size=contents.disk_bytes,
            ttl=self._ttl,
        )
        self._index.set_contents(session.name, contents)

    def finish(self, session: Session, size: int) -> None:
        """The session's file is closed, and has so many bytes on the disk."""
        self._index.end_writing(session.name, size)
        if not session.continues:
            self._metrics.add(segments_added=1, bytes_added=size)
        self._committed()

    def discard(self, session: Session) -> None:
        """The session's file is closed, and holds nothing that counts."""
        found = self._index.segment(session.name)
        if found is not None:
            self._room.remove(found)
        elif session.path is not None and disk_bytes(session.path):
            os.unlink(session.path)

    def measured(self, session: Session, positions: int, seconds: float) -> None:
        """So many positions took so long to compute."""
        self._index.measured(session.namespace, positions, seconds)
