"""What the index knows of segments, as queries that only read. One transaction each, and none waits for a writer.

Which segment is the best match, and which is to go, is decided in `matching` and `policy`. Files are not looked at.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from ..errors import LibraryFullError
from .database import Database, IndexLostError
from .segment import Segment, StoredNamespace, segment_path

_COLUMNS = """segments.id, segments.name, segments.parent, segments.start, segments.stop, segments.depth,
    segments.token_offset, segments.checkpoints, segments.bytes, segments.reserved, segments.writing, segments.broken,
    segments.pinned, segments.ttl, segments.created, segments.used, segments.hits, segments.reused, segments.children,
    segments.branches, segments.pushed, segments.spare, segments.namespace, namespaces.digest, namespaces.model,
    namespaces.folder, namespaces.seconds / max(namespaces.positions, 1), parents.name"""
_FROM = "segments JOIN namespaces ON namespaces.id = segments.namespace"
_PARENTS = "LEFT JOIN segments parents ON parents.id = segments.parent"

NEIGHBOURS = 4
"""Segments on each side of a prompt's place among those that continue at one position. One has the longest common
prefix; others count where several have the same ids, which concurrent sessions make."""

CANDIDATES = 64
"""Segments that are looked at among those with one hash."""

MOST_REPLACEMENTS = 3
"""Damaged indexes that are replaced, or times that room is made, during one query."""

Method = TypeVar("Method", bound=Callable[..., Any])


def recovering(method: Method) -> Method:
    """Run a query again after filling an index that replaced a damaged one, or making room on a full disk."""

    @functools.wraps(method)
    def run(index: IndexReader, *args: Any, **more: Any) -> Any:
        for _ in range(MOST_REPLACEMENTS):
            try:
                return method(index, *args, **more)
            except IndexLostError:
                index.refill()
            except LibraryFullError:
                if not index.make_room():
                    raise
        return method(index, *args, **more)

    return cast(Method, run)


class IndexReader:
    """Queries on a library's index that read.

    Args:
        database: its connections.
        folder: the library's, which paths begin with.
    """

    def __init__(self, database: Database, folder: str) -> None:
        self.database = database
        self._folder = folder
        self.refill: Callable[[], None] = lambda: None
        """Called when the index was lost, to fill the new one from the segments."""
        self.make_room: Callable[[], bool] = lambda: False
        """Called when the disk is too full to write to the index; returns True if there is more room now."""

    @recovering
    def namespaces(self) -> list[StoredNamespace]:
        """Return all namespaces, by model."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT digest, namespaces.model, document, count(segments.id), coalesce(sum(segments.bytes), 0), "
                "coalesce(sum(segments.stop - segments.start), 0), position_bytes, seconds / max(positions, 1) "
                "FROM namespaces "
                "LEFT JOIN segments ON segments.namespace = namespaces.id GROUP BY namespaces.id ORDER BY 2, 1"
            ).fetchall()
        return [
            StoredNamespace(
                digest=digest,
                model=model,
                document=json.loads(document),
                segments=segments,
                bytes=size,
                positions=positions,
                position_bytes=position_bytes,
                seconds_per_position=seconds,
            )
            for digest, model, document, segments, size, positions, position_bytes, seconds in rows
        ]

    @recovering
    def namespace_id(self, digest: str) -> int | None:
        """Return a namespace's number; None if nothing is stored of it."""
        with self.database.reading() as connection:
            row = connection.execute("SELECT id FROM namespaces WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else int(row[0])

    @recovering
    def segment(self, name: str) -> Segment | None:
        """Return a segment by its name."""
        return next(self._segments("WHERE segments.name = ?", (name,)), None)

    @recovering
    def segments(self) -> list[Segment]:
        """Return all segments: parents before their children."""
        return list(self._segments("ORDER BY segments.namespace, segments.depth, segments.id", ()))

    @recovering
    def deepest(self, hash_of: Callable[[int], bytes], blocks: int) -> int:
        """Return the last block boundary of a prompt that a segment has, by a binary search; 0 if none has any.

        Args:
            hash_of: returns the hash of the prefix that ends at a block boundary.
            blocks: block boundaries of the prompt.
        """
        low, high = 0, blocks
        with self.database.reading() as connection:
            while low < high:
                middle = (low + high + 1) // 2
                row = connection.execute("SELECT 1 FROM blocks WHERE hash = ? LIMIT 1", (hash_of(middle),)).fetchone()
                low, high = (low, middle - 1) if row is None else (middle, high)
        return low

    @recovering
    def candidates(self, hash: bytes) -> list[Segment]:
        """Return segments with the hash of a prefix."""
        with self.database.reading() as connection:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM blocks JOIN segments ON segments.id = blocks.segment "
                f"JOIN namespaces ON namespaces.id = segments.namespace {_PARENTS} "
                f"WHERE blocks.hash = ? AND segments.broken IS NULL LIMIT {CANDIDATES}",
                (hash,),
            ).fetchall()
        return [self._segment(row) for row in rows]

    @recovering
    def last_point(self, anchor: bytes, below: int) -> int | None:
        """Return the last position below some position at which a segment has a checkpoint, of those whose last block
        boundary has a hash; None if there is none."""
        with self.database.reading() as connection:
            row = connection.execute(
                "SELECT max(position) FROM points WHERE anchor = ? AND position < ?", (anchor, below)
            ).fetchone()
        return None if row is None else row[0]

    @recovering
    def pointed(self, hash: bytes) -> list[Segment]:
        """Return segments that have a checkpoint where the prefix of a hash ends."""
        return list(
            self._segments(
                "WHERE segments.id IN (SELECT segment FROM points WHERE hash = ?) AND segments.broken IS NULL "
                f"LIMIT {CANDIDATES}",
                (hash,),
            )
        )

    @recovering
    def neighbours(self, namespace: int, parent: int, start: int, head: bytes) -> list[Segment]:
        """Return the segments that continue a parent at a position and whose first token ids are most like a prompt's:
        its neighbours in the order of ids."""
        where = "WHERE segments.namespace = ? AND segments.parent = ? AND segments.start = ?"
        some = "AND segments.stop > segments.start AND segments.broken IS NULL"
        found: list[Segment] = []
        for side in ("<= ? {} ORDER BY segments.head DESC", "> ? {} ORDER BY segments.head ASC"):
            more = side.format(some)
            found += self._segments(
                f"{where} AND segments.head {more} LIMIT {NEIGHBOURS}", (namespace, parent, start, head)
            )
        return found

    @recovering
    def children(self, namespace: int, parent: int, low: int, high: int) -> list[Segment]:
        """Return segments that continue a parent at a position in [low, high)."""
        return list(
            self._segments(
                "WHERE segments.namespace = ? AND segments.parent = ? AND segments.start >= ? AND segments.start < ? "
                f"AND segments.stop > segments.start AND segments.broken IS NULL "
                f"ORDER BY segments.start DESC LIMIT {CANDIDATES}",
                (namespace, parent, low, high),
            )
        )

    @recovering
    def chain(self, segment: Segment) -> list[Segment]:
        """Return a segment's ancestors, the first one first, and itself; fewer where one is missing."""
        found = [segment]
        while found[0].parent_id:
            parent = next(self._segments("WHERE segments.id = ?", (found[0].parent_id,)), None)
            if parent is None:
                break
            found.insert(0, parent)
        return found

    @recovering
    def written(self) -> list[Segment]:
        """Return the segments that a session has open, or had when its process died."""
        return list(self._segments("WHERE segments.writing > 0", ()))

    @recovering
    def oldest_leaves(self, count: int) -> list[Segment]:
        """Return segments without children, pin or writer, the longest unused first."""
        return list(
            self._segments(
                "WHERE segments.children = 0 AND segments.pinned = 0 AND segments.writing = 0 "
                "ORDER BY segments.used, segments.id LIMIT ?",
                (count,),
            )
        )

    @recovering
    def expired(self, now: float) -> list[Segment]:
        """Return leaves whose time to live is over."""
        return list(
            self._segments(
                "WHERE segments.ttl IS NOT NULL AND segments.used + segments.ttl < ? AND segments.children = 0 "
                "AND segments.pinned = 0 AND segments.writing = 0",
                (now,),
            )
        )

    @recovering
    def unpushed(self) -> list[Segment]:
        """Return segments of which the object store has not everything, parents first."""
        return list(
            self._segments(
                "WHERE segments.pushed < segments.stop AND segments.broken IS NULL AND segments.writing = 0 "
                "ORDER BY segments.depth, segments.id",
                (),
            )
        )

    def _segments(self, rest: str, arguments: Sequence[Any]) -> Iterator[Segment]:
        with self.database.reading() as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM {_FROM} {_PARENTS} {rest}", arguments).fetchall()
        return map(self._segment, rows)

    def _segment(self, row: Sequence[Any]) -> Segment:
        number, name, parent_id, start, stop, depth, token_offset, checkpoints, size, reserved, writing, broken = row[
            :12
        ]
        pinned, ttl, created, used, hits, reused, children, branches, pushed, spare = row[12:22]
        namespace, digest, model, folder, seconds, parent = row[22:]
        return Segment(
            id=number,
            name=name,
            namespace=digest,
            model=model,
            path=segment_path(self._folder, folder, name),
            parent=parent,
            start=start,
            stop=stop,
            depth=depth,
            bytes=size + reserved,
            children=children,
            branches=branches,
            writing=bool(writing),
            pinned=bool(pinned),
            ttl=ttl,
            created=created,
            used=used,
            hits=hits,
            reused=reused,
            seconds=seconds * (stop - start),
            broken=broken,
            pushed=pushed,
            parent_id=parent_id,
            namespace_id=namespace,
            token_offset=token_offset,
            checkpoints=None if checkpoints is None else tuple(json.loads(checkpoints)),
            writer_pid=writing,
            reserved=reserved,
            spare_bytes=spare,
        )

    @recovering
    def usage(self) -> tuple[int, int]:
        """Return the bytes of all segments, with what is reserved, and their number."""
        with self.database.reading() as connection:
            size, count = connection.execute("SELECT bytes, segments FROM usage").fetchone()
        return size, count

    @recovering
    def totals(self) -> dict[str, float]:
        """Return what all processes have counted."""
        with self.database.reading() as connection:
            return dict(connection.execute("SELECT name, value FROM totals").fetchall())

    @recovering
    def check(self) -> None:
        """Assert what always holds."""
        with self.database.reading() as connection:
            one = connection.execute
            total = one("SELECT coalesce(sum(bytes + reserved), 0), count(*) FROM segments").fetchone()
            assert one("SELECT bytes, segments FROM usage").fetchone() == total
            wrong = one(
                "SELECT name FROM segments s WHERE children != (SELECT count(*) FROM segments WHERE parent = s.id)"
            ).fetchall()
            assert not wrong, wrong
            orphans = one(
                "SELECT name FROM segments WHERE parent > 0 AND parent NOT IN (SELECT id FROM segments)"
            ).fetchall()
            assert not orphans, orphans
            assert one("SELECT count(*) FROM points WHERE segment NOT IN (SELECT id FROM segments)").fetchone() == (0,)
            assert one("SELECT count(*) FROM blocks WHERE segment NOT IN (SELECT id FROM segments)").fetchone() == (0,)
            lost = "SELECT count(*) FROM remote_hashes WHERE remote NOT IN (SELECT id FROM remotes)"
            assert one(lost).fetchone() == (0,)
