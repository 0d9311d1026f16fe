"""A library of many segments: lookups, sessions, puts and evictions, and what the eviction policy saves.

    python benchmarks/bench_library.py [--segments 100000] [--requests 4000] [--rounds 15] [--json FILE]

Most segments are in the index alone, with random hashes: a lookup reads no file but those of its match, and these are
real. Lengths are log-uniform up to 128k tokens. Traces and the simulation are in `library_traces.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from harness import Bar, Report, Task, arguments, measure, workspace
from library_traces import POSITION_BYTES, TRACES, rates

import kvmmap
from kvmmap.library.index import new_name

SHAPE = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 16}
LONGEST = 131_072
BUDGETS = (100_000, 300_000, 1_000_000)
"""Tokens."""

NAMESPACE = kvmmap.Namespace.build(**SHAPE, model=kvmmap.ModelInfo(name="benchmark"))


def main() -> None:
    parser = arguments("Benchmark the library.", rounds=15)
    parser.add_argument("--segments", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=4000, help="of each trace")
    args = parser.parse_args()
    report = Report("library")
    with workspace(args.dir) as folder:
        few, many = make(folder / "few", 100), make(folder / "many", args.segments)
        size = sum(many[0].stats().index_bytes for _ in range(1)) / 1e6
        report.note(f"index of {args.segments:,} segments", f"{size:,.0f} MB")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tasks = [
            Task(name=f"{what}, {name}", run=run)
            for name, (library, prompt) in (("among 100", few), (f"among {args.segments:,}", many))
            for what, run in operations(library, prompt)
        ]
        measured = measure(tasks, args.rounds)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report.note("memory of all these operations", f"{(after - before) / 1024:,.0f} MB")
        report.show("a library of 2 layers, 1 x 16", measured, [task.name for task in tasks[:1]])
        big = f"among {args.segments:,}"
        for what, name, most in (("match 128k tokens", big, 5), ("match 128k tokens", "among 100", 1.5)):
            report.bars.append(Bar(f"{what} {name}", most, measured.time(f"{what}, {name}").median * 1e3, "ms"))
        match, session = (measured.time(f"{what}, {big}").median for what in ("match 128k tokens", "session on it"))
        report.bars.append(Bar(f"a session on a match, besides, {big}", 3, (session - match) * 1e3, "ms"))
        for count in (1, 2, 8):
            rate, worst = at_once(many[0].path, many[1], count)
            report.note(f"lookups by {count} processes", f"{rate:,.0f} a second, the slowest {worst * 1e3:.1f} ms")
        for library, _ in (few, many):
            library.close()
    for name, trace in TRACES.items():
        requests = trace(1, args.requests)
        for budget in BUDGETS:
            told = ", ".join(f"{policy} {share:.4f}" for policy, share in rates(requests, budget))
            report.note(f"tokens reused, {name}, {budget:,} tokens", told)
    costs(report, args.requests)
    report.finish(args.json)


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
    fill_index(library, count - len(library.entries()))
    return library, ids


def fill_index(library: kvmmap.Library, count: int) -> None:
    """Add segments to the index that have no file."""
    random, now = Random(1), time.time()
    numbers = np.random.default_rng(2)
    blocks: list[tuple[bytes, int]] = []
    index = library._index
    number = index.namespace_id(NAMESPACE.digest)
    with index.database.writing() as connection:
        first = connection.execute("SELECT max(id) FROM segments").fetchone()[0] + 1
        for segment in range(first, first + count):
            length = int(256 * (LONGEST / 256) ** random.random())
            head = numbers.integers(0, 50_000, 64).astype(">i4").tobytes()
            connection.execute(
                "INSERT INTO segments (id, name, namespace, stop, head, bytes, created, used) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (segment, new_name("synthetic"), number, length, head, length * 100, now, now - random.random() * 1e6),
            )
            hashes = numbers.bytes(16 * (length // 256))
            blocks += [(hashes[at : at + 16], segment) for at in range(0, len(hashes), 16)]
        blocks.sort()
        connection.executemany("INSERT OR IGNORE INTO blocks VALUES (?, ?)", blocks)


def operations(library: kvmmap.Library, ids: np.ndarray) -> list[tuple[str, Callable[[], object]]]:
    """Return what is timed."""
    other = np.random.default_rng(5).integers(0, 50_000, LONGEST)
    rows = np.ones((2, 16, 1, 16), np.float32)
    count = iter(range(10**9))

    def session() -> None:
        opened.append(library.session(NAMESPACE, ids[:LONGEST], limit=LONGEST - 7))

    def put() -> None:
        fresh = np.full(16, next(count) % 50_000) + np.arange(16) * 3
        with library.session(NAMESPACE, fresh) as made:
            made.extend(rows[:, : 16 - made.reused], rows[:, : 16 - made.reused], fresh[made.reused :])

    opened: list[kvmmap.QuantizedKvCache] = []

    def session_and_forget() -> None:
        session()
        while len(opened) > 1:
            opened.pop(0).close()

    return [
        ("match 128k tokens", partial(library.match, NAMESPACE, ids[:LONGEST])),
        ("match nothing of 128k", partial(library.match, NAMESPACE, other)),
        ("match 1k tokens", partial(library.match, NAMESPACE, ids[:1000])),
        ("session on it", session_and_forget),
        ("put 16 tokens", put),
        ("plan an eviction", lambda: library._index.oldest_leaves(256)),
    ]


def at_once(path: str, ids: np.ndarray, count: int) -> tuple[float, float]:
    """Return lookups a second by so many processes, beside one that puts, and the slowest of them."""
    with multiprocessing.get_context("fork").Pool(count) as pool:
        found = pool.map(partial(_look, path, ids), range(count))
    return sum(len(times) for times in found) / 2.0, max(max(times) for times in found)


def _look(path: str, ids: np.ndarray, number: int) -> list[float]:
    times: list[float] = []
    with kvmmap.Library(path) as library:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            start = time.perf_counter()
            library.match(NAMESPACE, ids[: 4000 + number])
            times.append(time.perf_counter() - start)
    return times


def costs(report: Report, requests: int) -> None:
    """Note what a bucket shared by 1,000 machines takes, by the chat trace: one session a minute and machine."""
    trace = TRACES["chat"](3, requests)
    asked = sum(sum(size for _, size in request.chunks) for request in trace)
    new = sum(request.chunks[-1][1] + request.answer[1] for request in trace)
    per_session = new / len(trace) * POSITION_BYTES
    machines, sessions = 1000, 60 * 24
    puts = machines * sessions * 2  # a segment and its manifest
    lists = machines * 24 * 3600 / 5
    report.note(
        "a session of the chat trace", f"{asked / len(trace):,.0f} tokens, of which {new / len(trace):,.0f} new"
    )
    report.note(
        "1,000 machines, a session a minute each, in a day", f"{puts / 1e6:.1f} M puts, {lists / 1e6:.1f} M lists"
    )
    report.note("and what they store", f"{machines * sessions * per_session / 1e12:.1f} TB (SmolLM2-135M, int8)")
    fetched = machines * sessions * 0.02
    report.note(
        "and fetch, if 2 % of sessions change machines",
        f"{fetched * asked / len(trace) * POSITION_BYTES / 1e12:.2f} TB",
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
