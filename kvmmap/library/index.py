"""What changes a library's index: add, grow, use, remove. One transaction each; `index_reader` has what only reads."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .index_reader import IndexReader, recovering
from .namespace import Namespace
from .segment import Segment

GOING = "is being removed"
"""What is wrong with a segment whose file is about to be deleted."""


class Contents(NamedTuple):
    """What a committed segment holds, for the index."""

    stop: int
    head: bytes
    hashes: bytes
    """Hashes of the block boundaries in (start, stop], 16 bytes each."""
    token_offset: int
    checkpoints: tuple[int, ...] | None
    disk_bytes: int
    spare_bytes: int = 0
    """Of checkpoints that may be dropped."""
    points: tuple[tuple[int, bytes, bytes], ...] = ()
    """Of each checkpoint its position, and the hashes of the prefixes that end at the last block boundary up to it, and
    at it."""


class Index(IndexReader):
    """Queries on a library's index, all of them."""

    @recovering
    def add_namespace(self, digest: str, folder: str, document: Mapping[str, Any], model: str, size: int) -> int:
        """Return a namespace's number; add it if it is new."""
        model = model.encode(errors="backslashreplace").decode()  # a config may name it by what is no text
        with self.database.writing() as connection:
            connection.execute(
                "INSERT INTO namespaces (digest, folder, document, model, position_bytes) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (digest, folder, json.dumps(document), model, size),
            )
            row = connection.execute("SELECT id FROM namespaces WHERE digest = ?", (digest,)).fetchone()
        return int(row[0])

    @recovering
    def add(
        self,
        name: str,
        namespace: int,
        *,
        parent: int,
        start: int,
        size: int,
        ttl: float | None,
        writing: bool = True,
        used: float | None = None,
    ) -> int | None:
        """Add a segment with nothing committed; None if its parent is no longer there.

        Args:
            name: the segment's.
            namespace: number of its namespace.
            parent: number of its parent, or 0.
            start: its first own position.
            size: bytes on the disk.
            ttl: as in `Segment`.
            writing: a session has it open.
            used: time of its last use; now by default.
        """
        now = time.time()
        with self.database.writing() as connection:
            depth = 1
            if parent:
                row = connection.execute(
                    "SELECT depth FROM segments WHERE id = ? AND broken IS NULL", (parent,)
                ).fetchone()
                if row is None:
                    return None
                depth = row[0] + 1
            found = connection.execute(
                "INSERT INTO segments "
                "(name, namespace, parent, start, stop, depth, bytes, writing, ttl, created, used) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING id",
                (
                    name,
                    namespace,
                    parent,
                    start,
                    start,
                    depth,
                    size,
                    os.getpid() if writing else 0,
                    ttl,
                    now,
                    now if used is None else used,
                ),
            ).fetchone()
            if found is None:
                found = connection.execute("SELECT id FROM segments WHERE name = ?", (name,)).fetchone()
        return int(found[0])

    @recovering
    def set_contents(self, name: str, contents: Contents) -> bool:
        """Record what was committed to a segment; False if it is not in the index."""
        with self.database.writing() as connection:
            row = connection.execute("SELECT id FROM segments WHERE name = ?", (name,)).fetchone()
            if row is None:
                return False
            number = int(row[0])
            checkpoints = None if contents.checkpoints is None else json.dumps(contents.checkpoints)
            connection.execute(
                "UPDATE segments SET stop = ?, head = ?, token_offset = ?, checkpoints = ?, spare = ?, bytes = ?, "
                "reserved = max(0, reserved - max(0, ? - bytes)), broken = NULL WHERE id = ?",
                (
                    *(contents.stop, contents.head, contents.token_offset, checkpoints, contents.spare_bytes),
                    *(contents.disk_bytes, contents.disk_bytes, number),
                ),
            )
            if contents.checkpoints is not None:
                connection.execute("DELETE FROM points WHERE segment = ?", (number,))
                connection.executemany(
                    "INSERT INTO points (segment, position, anchor, hash) VALUES (?, ?, ?, ?)",
                    [(number, *point) for point in contents.points],
                )
            row = connection.execute("SELECT hashes FROM spans WHERE segment = ?", (number,)).fetchone()
            old: bytes = b"" if row is None else row[0]
            if old != contents.hashes:
                same = old == contents.hashes[: len(old)]
                if not same:
                    _forget_blocks(connection, number, old)
                fresh = contents.hashes[len(old) if same else 0 :]
                connection.executemany(
                    "INSERT OR IGNORE INTO blocks (hash, segment) VALUES (?, ?)",
                    [(fresh[at : at + 16], number) for at in range(0, len(fresh), 16)],
                )
                connection.execute("INSERT OR REPLACE INTO spans VALUES (?, ?)", (number, contents.hashes))
        return True

    @recovering
    def reserve(self, name: str, size: int, limit: int | None) -> bool:
        """Reserve bytes on the disk for who writes a segment; False, and nothing is reserved, beyond the limit."""
        with self.database.writing() as connection:
            if limit is not None and connection.execute("SELECT bytes FROM usage").fetchone()[0] + size > limit:
                return False
            connection.execute("UPDATE segments SET reserved = reserved + ? WHERE name = ?", (size, name))
        return True

    @recovering
    def set_whole(self, name: str) -> None:
        """Record that a segment continues no other one after all."""
        with self.database.writing() as connection:
            row = connection.execute("SELECT parent FROM segments WHERE name = ?", (name,)).fetchone()
            if row is not None:
                connection.execute(
                    "UPDATE segments SET parent = 0, start = 0, stop = 0, depth = 1 WHERE name = ?", (name,)
                )
                connection.execute(
                    "UPDATE segments SET children = children - 1, branches = branches - 1 WHERE id = ?", (row[0],)
                )

    @recovering
    def set_bytes(self, name: str, size: int) -> None:
        """Record a segment's bytes on the disk."""
        with self.database.writing() as connection:
            connection.execute(
                "UPDATE segments SET bytes = ?, reserved = max(0, reserved - max(0, ? - bytes)) WHERE name = ?",
                (size, size, name),
            )

    @recovering
    def set_checkpoints(self, name: str, checkpoints: Sequence[int], size: int | None = None) -> None:
        """Record which checkpoints a segment has, older ones being dropped, and its bytes on the disk if known."""
        with self.database.writing() as connection:
            connection.execute(
                "UPDATE segments SET checkpoints = ?, spare = 0, bytes = coalesce(?, bytes) WHERE name = ?",
                (json.dumps(checkpoints), size, name),
            )
            connection.execute(
                "DELETE FROM points WHERE segment = (SELECT id FROM segments WHERE name = ?) "
                "AND position NOT IN (SELECT value FROM json_each(?))",
                (name, json.dumps(checkpoints)),
            )

    @recovering
    def begin_writing(self, name: str) -> bool:
        """Record that a session appends to a segment; False if it is not in the index."""
        with self.database.writing() as connection:
            return (
                connection.execute("UPDATE segments SET writing = ? WHERE name = ?", (os.getpid(), name)).rowcount == 1
            )

    @recovering
    def end_writing(self, name: str, size: int) -> None:
        """Record that nobody appends to a segment any more, and its bytes on the disk."""
        with self.database.writing() as connection:
            connection.execute("UPDATE segments SET writing = 0, reserved = 0, bytes = ? WHERE name = ?", (size, name))

    @recovering
    def use(self, chain: Sequence[Segment], length: int, computed: int) -> None:
        """Record that a session continues a prefix of `length` positions, and computes the rest of its prompt."""
        now = time.time()
        with self.database.writing() as connection:
            for segment in chain:
                connection.execute(
                    "UPDATE segments SET used = max(used, ?), hits = hits + 1, reused = reused + ? WHERE id = ?",
                    (now, max(0, min(segment.stop, length) - segment.start), segment.id),
                )
            seconds = 0.0
            if chain and length:
                seconds = length * chain[-1].seconds / max(chain[-1].positions, 1)
            _count(
                connection,
                sessions=1,
                hits=int(length > 0),
                tokens_reused=length,
                tokens_computed=computed,
                seconds_saved=seconds,
            )

    @recovering
    def touch(self, name: str) -> None:
        """Record that a segment was used just now."""
        with self.database.writing() as connection:
            connection.execute("UPDATE segments SET used = max(used, ?) WHERE name = ?", (time.time(), name))

    @recovering
    def measured(self, namespace: Namespace, positions: int, seconds: float) -> None:
        """Record how long positions of a namespace took to compute. Later measurements weigh more."""
        with self.database.writing() as connection:
            connection.execute(
                "UPDATE namespaces SET positions = positions - positions / 8 + ?, seconds = seconds * "
                "(positions - positions / 8) / max(positions, 1) + ? WHERE digest = ?",
                (positions, seconds, namespace.digest),
            )

    @recovering
    def begin_removal(self, name: str, *, pinned: bool) -> bool:
        """Record that a segment goes, so that nothing matches or continues it any more; False if it has children.

        Args:
            name: the segment's.
            pinned: it may be a pinned one.
        """
        with self.database.writing() as connection:
            return (
                connection.execute(
                    "UPDATE segments SET broken = ?, writing = ? WHERE name = ? AND children = 0 AND pinned <= ?",
                    (GOING, os.getpid(), name, pinned),
                ).rowcount
                == 1
            )

    @recovering
    def remove(self, name: str, *, evicted: bool = False) -> None:
        """Remove a segment without children, whose file is gone, from the index.

        Args:
            name: the segment's.
            evicted: count it as evicted.
        """
        with self.database.writing() as connection:
            row = connection.execute(
                "SELECT id, bytes FROM segments WHERE name = ? AND children = 0", (name,)
            ).fetchone()
            if row is None:
                return
            number, size = row
            span = connection.execute("SELECT hashes FROM spans WHERE segment = ?", (number,)).fetchone()
            _forget_blocks(connection, number, b"" if span is None else span[0])
            connection.execute("DELETE FROM spans WHERE segment = ?", (number,))
            connection.execute("DELETE FROM points WHERE segment = ?", (number,))
            connection.execute("DELETE FROM segments WHERE id = ?", (number,))
            if evicted:
                _count(connection, evictions=1, bytes_evicted=size)

    @recovering
    def mark_broken(self, name: str, what: str) -> None:
        """Record that a segment is of no use, nor are those that continue it."""
        with self.database.writing() as connection:
            row = connection.execute("SELECT id FROM segments WHERE name = ?", (name,)).fetchone()
            if row is None:
                return
            connection.execute("UPDATE segments SET broken = ? WHERE id = ?", (what, row[0]))
            connection.execute(
                "WITH RECURSIVE below (id) AS (SELECT id FROM segments WHERE parent = ? UNION "
                "SELECT segments.id FROM segments JOIN below ON segments.parent = below.id) "
                "UPDATE segments SET broken = ? WHERE id IN below AND broken IS NULL",
                (row[0], f"continues {name}, which is of no use"),
            )

    @recovering
    def set_pinned(self, names: Iterable[str], pinned: bool) -> None:
        """Pin segments, or unpin them."""
        with self.database.writing() as connection:
            connection.executemany("UPDATE segments SET pinned = ? WHERE name = ?", [(pinned, name) for name in names])

    @recovering
    def set_ttl(self, name: str, ttl: float | None) -> None:
        """Set a segment's time to live."""
        with self.database.writing() as connection:
            connection.execute("UPDATE segments SET ttl = ? WHERE name = ?", (ttl, name))

    @recovering
    def set_pushed(self, name: str, stop: int) -> None:
        """Record that the object store has a segment's positions below `stop`."""
        with self.database.writing() as connection:
            connection.execute("UPDATE segments SET pushed = ? WHERE name = ?", (stop, name))

    @recovering
    def count(self, **amounts: float) -> None:
        """Add to what all processes have counted."""
        with self.database.writing() as connection:
            _count(connection, **amounts)

    @recovering
    def clear(self) -> None:
        """Remove all segments and namespaces from the index; what was counted stays."""
        with self.database.writing() as connection:
            for table in ("blocks", "points", "spans", "segments", "namespaces"):
                connection.execute(f"DELETE FROM {table}")


def _count(connection: sqlite3.Connection, **amounts: float) -> None:
    connection.executemany(
        "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        [(name, amount) for name, amount in amounts.items() if amount],
    )


def _forget_blocks(connection: sqlite3.Connection, number: int, hashes: bytes) -> None:
    connection.executemany(
        "DELETE FROM blocks WHERE hash = ? AND segment = ?",
        [(hashes[at : at + 16], number) for at in range(0, len(hashes), 16)],
    )


def new_name(library: str) -> str:
    """Return a new segment's name: the time, so that names sort by age, the library's number, and 48 random bits."""
    return f"{time.time_ns() // 1_000_000:012x}-{library}-{os.urandom(6).hex()}"


def is_made_name(name: str) -> bool:
    """True if a file's name is one that `new_name` makes. Other files are their owners' and are never evicted."""
    return re.fullmatch("[0-9a-f]{12}-[^-]+-[0-9a-f]{12}", name) is not None


def is_of(name: str, library: str) -> bool:
    """True if a segment was made in a library: only there it may be appended to."""
    return name.split("-")[1:2] == [library]
