"""The tables of a library's index, and how SQLite is set up for it.

The index is derived: everything in it but uses, and what was measured, can be read from the segments again. So a table
is never migrated: another version of the schema is another index, which is rebuilt.
"""

from __future__ import annotations

VERSION = 8
"""Number of this schema, in the database's `user_version`."""

PRAGMAS = (
    "PRAGMA journal_mode = WAL",  # readers never wait for a writer, nor a writer for readers
    "PRAGMA synchronous = NORMAL",  # no sync a transaction: a machine crash may lose the last uses, and no more
    "PRAGMA mmap_size = 0",  # a file that is cut off while it is mapped would kill the process
    "PRAGMA cache_size = -16384",  # KiB a connection: the upper pages of all trees
    "PRAGMA temp_store = MEMORY",
    "PRAGMA recursive_triggers = OFF",
)

TABLES = """
CREATE TABLE namespaces (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    folder TEXT NOT NULL,
    document TEXT NOT NULL,
    model TEXT NOT NULL,
    position_bytes INTEGER NOT NULL,
    seconds REAL NOT NULL DEFAULT 0,
    positions INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    namespace INTEGER NOT NULL,
    parent INTEGER NOT NULL DEFAULT 0,
    start INTEGER NOT NULL DEFAULT 0,
    stop INTEGER NOT NULL DEFAULT 0,
    depth INTEGER NOT NULL DEFAULT 1,
    head BLOB NOT NULL DEFAULT x'',
    token_offset INTEGER NOT NULL DEFAULT 0,
    checkpoints TEXT,
    spare INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    reserved INTEGER NOT NULL DEFAULT 0,
    writing INTEGER NOT NULL DEFAULT 0,
    broken TEXT,
    pinned INTEGER NOT NULL DEFAULT 0,
    ttl REAL,
    created REAL NOT NULL,
    used REAL NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    reused INTEGER NOT NULL DEFAULT 0,
    children INTEGER NOT NULL DEFAULT 0,
    branches INTEGER NOT NULL DEFAULT 0,
    pushed INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE INDEX siblings ON segments (namespace, parent, start, head);
CREATE INDEX families ON segments (parent) WHERE parent > 0;
CREATE INDEX leaves ON segments (used, id) WHERE children = 0 AND pinned = 0 AND writing = 0;
CREATE INDEX mortals ON segments (used + ttl) WHERE ttl IS NOT NULL;
CREATE INDEX written ON segments (id) WHERE writing > 0;
CREATE INDEX unpushed ON segments (id) WHERE pushed < stop;

CREATE TABLE blocks (
    hash BLOB NOT NULL,
    segment INTEGER NOT NULL,
    PRIMARY KEY (hash, segment)
) STRICT, WITHOUT ROWID;

CREATE TABLE points (
    segment INTEGER NOT NULL,
    position INTEGER NOT NULL,
    anchor BLOB NOT NULL,
    hash BLOB NOT NULL,
    PRIMARY KEY (segment, position)
) STRICT, WITHOUT ROWID;

CREATE INDEX anchored ON points (anchor, position);
CREATE INDEX pointed ON points (hash);

CREATE TABLE spans (segment INTEGER PRIMARY KEY, hashes BLOB NOT NULL) STRICT;

CREATE TABLE remote_groups (id INTEGER PRIMARY KEY, common TEXT NOT NULL UNIQUE) STRICT;

CREATE TABLE remotes (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    common INTEGER NOT NULL,
    parent TEXT,
    start INTEGER NOT NULL,
    stop INTEGER NOT NULL,
    hashes BLOB NOT NULL,
    parts TEXT NOT NULL,
    digests TEXT NOT NULL,
    size INTEGER NOT NULL,
    disk_bytes INTEGER NOT NULL,
    checkpoints TEXT
) STRICT;

CREATE INDEX remote_families ON remotes (parent, stop) WHERE parent IS NOT NULL;
CREATE INDEX remote_ends ON remotes (stop);

CREATE TABLE remote_hashes (hash BLOB NOT NULL, remote INTEGER NOT NULL, PRIMARY KEY (hash, remote))
    STRICT, WITHOUT ROWID;

CREATE TABLE remote_log (id INTEGER PRIMARY KEY CHECK (id = 1), url TEXT NOT NULL, position INTEGER NOT NULL) STRICT;

CREATE TABLE usage (id INTEGER PRIMARY KEY CHECK (id = 1), bytes INTEGER NOT NULL, segments INTEGER NOT NULL) STRICT;
INSERT INTO usage VALUES (1, 0, 0);

CREATE TABLE totals (name TEXT PRIMARY KEY, value REAL NOT NULL) STRICT, WITHOUT ROWID;

CREATE TRIGGER segment_added AFTER INSERT ON segments BEGIN
    UPDATE usage SET bytes = bytes + NEW.bytes + NEW.reserved, segments = segments + 1;
    UPDATE segments SET children = children + 1, branches = branches + 1 WHERE id = NEW.parent;
END;

CREATE TRIGGER segment_removed AFTER DELETE ON segments BEGIN
    UPDATE usage SET bytes = bytes - OLD.bytes - OLD.reserved, segments = segments - 1;
    UPDATE segments SET children = children - 1 WHERE id = OLD.parent;
END;

CREATE TRIGGER segment_grown AFTER UPDATE OF bytes, reserved ON segments BEGIN
    UPDATE usage SET bytes = bytes - OLD.bytes - OLD.reserved + NEW.bytes + NEW.reserved;
END;
"""
