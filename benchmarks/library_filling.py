"""Libraries of many segments for benchmarks: most are in the index alone, with random token ids.

Lengths are log-uniform from one block to 128k tokens. A lookup reads no file but those of its match, which are real.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import kvmmap
from kvmmap.library.index import new_name

SHAPE = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 16}
NAMESPACE = kvmmap.Namespace.build(**SHAPE, model=kvmmap.ModelInfo(name="benchmark"))
LONGEST = 131_072
BLOCK = 256
HEAD_TOKENS = 64
ROWS = 50_000
"""Rows of an insert."""


def make(folder: Path, count: int) -> tuple[kvmmap.Library, np.ndarray]:
    """Return a library of so many segments, and a prompt of 128k tokens that it has."""
    library = kvmmap.Library(folder)
    ids = np.random.default_rng(0).integers(0, 50_000, LONGEST + 16)
    # A system prompt, a document, and the rest: a chain of three.
    for stop in (3000, 60_000, LONGEST):
        with library.session(NAMESPACE, ids[:stop], limit=max(0, stop - 57_000), capacity=LONGEST + 4096) as session:
            rest = ids[session.reused : stop]
            rows = np.ones((2, len(rest), 1, 16), np.float32)
            session.extend(rows, rows, rest)
    fill(library, count - len(library.entries()))
    return library, ids


def fill(library: kvmmap.Library, count: int) -> None:
    """Add segments to the index that have no file."""
    random, now = np.random.default_rng(1), time.time()
    lengths = (BLOCK * (LONGEST / BLOCK) ** random.random(count)).astype(np.int64)
    index = library._index
    number = index.namespace_id(NAMESPACE.digest)
    assert number is not None
    with index.database.writing() as connection:
        first = connection.execute("SELECT max(id) FROM segments").fetchone()[0] + 1
        ages = random.random(count) * 1e6
        heads = random.integers(0, 50_000, (count, HEAD_TOKENS)).astype(">i4")
        rows = (
            (first + at, new_name("synthetic"), number, length, heads[at].tobytes(), length * 100, now, now - age)
            for at, (length, age) in enumerate(zip(lengths.tolist(), ages.tolist(), strict=True))
        )
        connection.executemany(
            "INSERT INTO segments (id, name, namespace, stop, head, bytes, created, used) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        _add_hashes(connection, random, first, lengths // BLOCK)
    with index.database.reading() as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _add_hashes(connection: sqlite3.Connection, random: np.random.Generator, first: int, blocks: np.ndarray) -> None:
    """Add the hashes of so many blocks of each segment, in their order, in which a tree grows at its end."""
    total = int(blocks.sum())
    hashes = random.integers(0, 2**64, (total, 2), np.uint64).astype(">u8")
    ends = np.cumsum(blocks)
    data = hashes.tobytes()
    connection.executemany(
        "INSERT INTO spans VALUES (?, ?)",
        ((first + at, data[16 * (end - n) : 16 * end]) for at, (n, end) in enumerate(zip(blocks, ends, strict=True))),
    )
    owners = np.repeat(np.arange(first, first + len(blocks)), blocks)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    connection.executemany("INSERT OR IGNORE INTO blocks VALUES (?, ?)", _sorted(hashes, owners, order))


def _sorted(hashes: np.ndarray, owners: np.ndarray, order: np.ndarray) -> Iterator[tuple[bytes, int]]:
    for start in range(0, len(order), ROWS):
        some = order[start : start + ROWS]
        data = hashes[some].tobytes()
        for at, owner in enumerate(owners[some].tolist()):
            yield data[16 * at : 16 * at + 16], owner
