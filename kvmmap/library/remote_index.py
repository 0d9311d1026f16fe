"""What the index knows of an object store: the segments that are there, and how far the log was followed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from sqlite3 import Connection

from .index import Index
from .index_reader import recovering
from .manifests import Manifest, RemoteSegment


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
                connection.execute("DELETE FROM remotes")
                connection.execute("DELETE FROM remote_hashes")
            for manifest in manifests:
                self._remember(connection, manifest.added)
                for name in manifest.removed:
                    self._forget(connection, name)
            connection.execute("INSERT OR REPLACE INTO remote_log VALUES (1, ?, ?)", (url, position))

    @recovering
    def remote(self, name: str) -> RemoteSegment | None:
        """Return a segment of the object store by its name."""
        with self.database.reading() as connection:
            row = connection.execute("SELECT entry FROM remotes WHERE name = ?", (name,)).fetchone()
        return None if row is None else RemoteSegment.of_json(json.loads(row[0]))

    @recovering
    def remote_count(self) -> int:
        """Return how many segments the object store has."""
        with self.database.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM remotes").fetchone()[0])

    @recovering
    def remotes(self) -> list[RemoteSegment]:
        """Return all segments of the object store."""
        with self.database.reading() as connection:
            rows = connection.execute("SELECT entry FROM remotes ORDER BY name").fetchall()
        found = (RemoteSegment.of_json(json.loads(row[0])) for row in rows)
        return [entry for entry in found if entry is not None]

    @recovering
    def remote_with_prefix(self, hash: bytes) -> list[RemoteSegment]:
        """Return segments of the object store that contain a prefix, by its hash."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT entry FROM remote_hashes JOIN remotes USING (name) WHERE hash = ? LIMIT 16", (hash,)
            ).fetchall()
        found = (RemoteSegment.of_json(json.loads(row[0])) for row in rows)
        return [entry for entry in found if entry is not None]

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
        connection.executemany(
            "INSERT OR REPLACE INTO remotes VALUES (?, ?, ?, ?, ?)",
            [(entry.name, entry.parent, entry.start, entry.stop, json.dumps(entry.to_json())) for entry in entries],
        )
        # In their order, in which many at once are quick: a snapshot has those of all segments.
        hashes = sorted((hash, entry.name) for entry in entries for hash in entry.hash_list())
        connection.executemany("INSERT OR IGNORE INTO remote_hashes VALUES (?, ?)", hashes)

    @staticmethod
    def _forget(connection: Connection, name: str) -> None:
        row = connection.execute("SELECT entry FROM remotes WHERE name = ?", (name,)).fetchone()
        entry = None if row is None else RemoteSegment.of_json(json.loads(row[0]))
        if entry is not None:
            connection.executemany(
                "DELETE FROM remote_hashes WHERE hash = ? AND name = ?", [(hash, name) for hash in entry.hash_list()]
            )
        connection.execute("DELETE FROM remotes WHERE name = ?", (name,))
