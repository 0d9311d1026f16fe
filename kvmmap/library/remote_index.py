"""What the index knows of an object store: the segments that are there, and how far the log was followed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from sqlite3 import Connection
from typing import Any

from .index import Index
from .index_reader import recovering
from .manifests import COMMON, Manifest, RemoteSegment

_FROM = "remotes JOIN remote_groups ON remote_groups.id = remotes.common"
_COLUMNS = "remote_groups.common, name, parent, start, stop, hashes, parts, digests, size, disk_bytes, checkpoints"


class RemoteIndex(Index):
    """Queries on a library's index, those on an object store as well."""

    @recovering
    def log_position(self, url: str) -> int:
        """Return the last number of the log that was followed; 0 if there was another store, or none."""
        with self.database.reading() as connection:
            row = connection.execute("SELECT position FROM remote_log WHERE url = ?", (url,)).fetchone()
        return 0 if row is None else int(row[0])

    @recovering
    def apply(self, url: str, before: int, position: int, manifests: Sequence[Manifest], anew: bool) -> None:
        """Take in what followed in the log, unless another process was faster.

        Args:
            url: the store's.
            before: the position that was followed from.
            position: the last number of the log that is covered.
            manifests: in order.
            anew: forget what was there before.
        """
        with self.database.writing() as connection:
            row = connection.execute("SELECT url, position FROM remote_log").fetchone()
            known = row[1] if row is not None and row[0] == url else 0
            if known != before:
                return
            if anew or row is None or row[0] != url:
                for table in ("remotes", "remote_hashes", "remote_groups"):
                    connection.execute(f"DELETE FROM {table}")
            added: dict[str, RemoteSegment] = {}
            for manifest in manifests:
                added |= {entry.name: entry for entry in manifest.added}
                if manifest.removed:
                    self._remember(connection, list(added.values()))
                    added = {}
                for name in manifest.removed:
                    self._forget(connection, name)
            self._remember(connection, list(added.values()))
            connection.execute("INSERT OR REPLACE INTO remote_log VALUES (1, ?, ?)", (url, position))

    @recovering
    def remote(self, name: str) -> RemoteSegment | None:
        """Return a segment of the object store by its name."""
        return next(iter(self._remotes(_FROM, "WHERE name = ?", (name,))), None)

    @recovering
    def remote_count(self) -> int:
        """Return how many segments the object store has."""
        with self.database.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM remotes").fetchone()[0])

    @recovering
    def remotes(self) -> list[RemoteSegment]:
        """Return all segments of the object store."""
        return self._remotes(_FROM, "ORDER BY name", ())

    @recovering
    def remote_with_prefix(self, hash: bytes) -> list[RemoteSegment]:
        """Return segments of the object store that contain a prefix, by its hash."""
        source = "remote_hashes JOIN remotes ON remotes.id = remote_hashes.remote "
        source += "JOIN remote_groups ON remote_groups.id = remotes.common"
        return self._remotes(source, "WHERE hash = ? LIMIT 16", (hash,))

    def _remotes(self, source: str, rest: str, arguments: Sequence[Any]) -> list[RemoteSegment]:
        with self.database.reading() as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM {source} {rest}", arguments).fetchall()
        return list(_segments(rows))

    @recovering
    def remote_stops(self, parents: Sequence[str], above: int, most: int) -> list[int]:
        """Return where segments of the object store end that continue one of some others, within (above, most]."""
        marks = ", ".join("?" * len(parents))
        with self.database.reading() as connection:
            rows = connection.execute(
                f"SELECT DISTINCT stop FROM remotes WHERE parent IN ({marks}) AND stop > ? AND stop <= ?",
                (*parents, above, most),
            ).fetchall()
        return [int(row[0]) for row in rows]

    @recovering
    def remote_ends(self, most: int) -> list[int]:
        """Return where segments of the object store end, at `most` at most."""
        with self.database.reading() as connection:
            rows = connection.execute("SELECT DISTINCT stop FROM remotes WHERE stop <= ?", (most,)).fetchall()
        return [int(row[0]) for row in rows]

    @recovering
    def forget_remote(self, name: str) -> None:
        """Forget a segment that the object store no longer has."""
        with self.database.writing() as connection:
            self._forget(connection, name)

    @staticmethod
    def _remember(connection: Connection, entries: Sequence[RemoteSegment]) -> None:
        """Take in segments of different names; one that is there already is replaced."""
        groups = _Groups(connection)
        following = connection.execute("SELECT coalesce(max(id), 0) FROM remotes").fetchone()[0] + 1
        if following > 1:
            for entry in entries:
                RemoteIndex._forget(connection, entry.name)
        remotes, hashes = [], []
        for number, entry in enumerate(entries, following):
            each = entry.hash_list()
            hashes += [(hash, number) for hash in each]
            remotes.append(
                (
                    *(number, entry.name, groups.number(entry), entry.parent, entry.start, entry.stop, b"".join(each)),
                    *("\n".join(entry.parts), "\n".join(entry.digests), entry.size, entry.disk_bytes),
                    None if entry.checkpoints is None else json.dumps(entry.checkpoints),
                )
            )
        connection.executemany("INSERT INTO remotes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", remotes)
        # In their order, in which many at once are quick: a snapshot has those of all segments.
        connection.executemany("INSERT OR IGNORE INTO remote_hashes VALUES (?, ?)", sorted(hashes))

    @staticmethod
    def _forget(connection: Connection, name: str) -> None:
        row = connection.execute("SELECT id, hashes FROM remotes WHERE name = ?", (name,)).fetchone()
        if row is not None:
            id, data = row
            connection.executemany(
                "DELETE FROM remote_hashes WHERE hash = ? AND remote = ?",
                [(data[at : at + 16], id) for at in range(0, len(data), 16)],
            )
            connection.execute("DELETE FROM remotes WHERE id = ?", (id,))


class _Groups:
    """Numbers of what segments of one namespace have in common."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: tuple[Any, int] = None, 0
        """The last document that was asked for, and its number."""

    def number(self, entry: RemoteSegment) -> int:
        """Return the number of a segment's group; add it if it is new."""
        if self._last[0] is entry.document:  # those of one manifest share it
            return self._last[1]
        common = json.dumps({name: getattr(entry, name) for name in COMMON}, sort_keys=True)
        self._connection.execute("INSERT OR IGNORE INTO remote_groups (common) VALUES (?)", (common,))
        row = self._connection.execute("SELECT id FROM remote_groups WHERE common = ?", (common,)).fetchone()
        self._last = entry.document, int(row[0])
        return self._last[1]


def _segments(rows: Sequence[Sequence[Any]]) -> Iterator[RemoteSegment]:
    common: dict[str, dict[str, Any]] = {}
    for text, name, parent, start, stop, hashes, parts, digests, size, disk_bytes, checkpoints in rows:
        if text not in common:
            common[text] = json.loads(text)
        yield RemoteSegment(
            **common[text],
            name=name,
            parent=parent,
            start=start,
            stop=stop,
            hashes=base64.b64encode(hashes).decode(),
            parts=parts.split("\n"),
            digests=digests.split("\n"),
            size=size,
            disk_bytes=disk_bytes,
            checkpoints=None if checkpoints is None else json.loads(checkpoints),
        )
