"""A library of 100,000 segments of up to 128k tokens beside one of 100: lookups, sessions, puts and evictions.

    python benchmarks/bench_library.py [--segments 100000] [--rounds 15] [--processor] [--json FILE]

Most segments are in the index alone (`library_filling.py`). A task takes turns in both libraries, so that their ratio
is of the same moment.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from harness import Bar, Measured, Report, Task, arguments, measure, nothing, workspace
from library_filling import LONGEST, NAMESPACE, make

import kvmmap

MATCH, SESSION = "match 128k tokens", "session on it"

FLAT = 2.0
"""Times that an operation among many segments may take of that among 100."""


def main() -> None:
    parser = arguments("Benchmark the library.", rounds=15)
    parser.add_argument("--segments", type=int, default=100_000)
    parser.add_argument("--processor", action="store_true", help="measure processor time: on a busy machine")
    args = parser.parse_args()
    report = Report("library")
    with workspace(args.dir) as folder:
        before = time.monotonic()
        few, many = make(folder / "few", 100), make(folder / "many", args.segments)
        stats = many[0].stats()
        seconds = time.monotonic() - before
        report.note(
            f"index of {stats.segments:,} segments", f"{stats.index_bytes / 1e6:,.0f} MB, made in {seconds:.0f} s"
        )
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        small, big = "among 100", f"among {args.segments:,}"
        tasks = [
            Task(name=f"{what}, {name}", run=repeated(run, calls), before=prepare, calls=calls)
            for pair in zip(operations(*few), operations(*many), strict=True)
            for name, (what, prepare, run, calls) in zip((small, big), pair, strict=True)
        ]
        measured = measure(tasks, args.rounds, time.process_time if args.processor else time.perf_counter)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
        report.note("memory of all these operations", f"{max(grown, 0) / 1024:,.0f} MB")
        report.show("a library of 2 layers, 1 x 16", measured, [])
        for name, most in ((small, 1.5), (big, 5)):
            match, session = (milliseconds(measured, f"{what}, {name}") for what in (MATCH, SESSION))
            report.bars.append(Bar(f"{MATCH} {name}", most, match, "ms"))
            report.bars.append(Bar(f"a session on a match, besides, {name}", 3, session - match, "ms"))
        for what in (MATCH, "match nothing of 128k", "match 1k tokens", SESSION, "put 16 tokens"):
            cost = 1 / measured.ratio(f"{what}, {big}", f"{what}, {small}").median
            report.bars.append(Bar(f"{what}: {big}, of that {small}", FLAT, cost, "x at most"))
        for library, _ in (few, many):
            library.close()
    report.finish(args.json)


def milliseconds(measured: Measured, name: str) -> float:
    return measured.time(name).median * 1e3


def repeated(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """Return what does something so many times."""

    def act() -> None:
        for _ in range(calls):
            run()

    return act


Operation = tuple[str, Callable[[], object], Callable[[], object], int]


def operations(library: kvmmap.Library, ids: np.ndarray) -> list[Operation]:
    """Return what is timed: its name, what is done before it, itself, and how often in a round."""
    other = np.random.default_rng(5).integers(0, 50_000, LONGEST)
    rows = np.ones((2, 16, 1, 16), np.float32)
    count = iter(range(10**9))
    opened: list[kvmmap.QuantizedKvCache] = []

    def forget() -> None:
        while opened:
            opened.pop().close()

    def session() -> None:
        opened.append(library.session(NAMESPACE, ids[:LONGEST], limit=LONGEST - 7))

    def put() -> None:
        fresh = np.full(16, next(count) % 50_000) + np.arange(16) * 3
        with library.session(NAMESPACE, fresh) as made:
            made.extend(rows[:, : 16 - made.reused], rows[:, : 16 - made.reused], fresh[made.reused :])

    return [
        (MATCH, nothing, partial(library.match, NAMESPACE, ids[:LONGEST]), 5),
        ("match nothing of 128k", nothing, partial(library.match, NAMESPACE, other), 5),
        ("match 1k tokens", nothing, partial(library.match, NAMESPACE, ids[:1000]), 5),
        (SESSION, forget, session, 3),
        ("put 16 tokens", forget, put, 1),
        ("evict", nothing, lambda: library._room.evict(1), 1),
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
