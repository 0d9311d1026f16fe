"""Lookups in one library by several processes, while another one puts: how many a second, and how long they wait.

    python benchmarks/bench_library_processes.py [--processes 8] [--seconds 3] [--json FILE]

With more processes than processors, the longest time of anything is that until a process gets its turn. So the bar is
for lookups in which a process slept (waited for a lock, or for the disk); beside it stands the longest turn of
processes that compute as long without a library, and that of all lookups. Likewise, lookups scale if they take no more
processor time beside others than alone, and nobody sleeps.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from harness import Bar, Report, arguments, workspace
from library_filling import NAMESPACE, make

import kvmmap

LONGEST_WAIT = 50.0
"""Milliseconds that a lookup may wait."""

SAME = 0.8
"""Of the lookups that one process alone makes in a second of processor time."""

PROMPT = 4000
"""Tokens that are looked up."""


def main() -> None:
    parser = arguments("Benchmark lookups by several processes.", rounds=3)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    report = Report("library_processes")
    with workspace(args.dir) as folder:
        library, ids = make(folder / "library", 2000)
        library.close()
        look = partial(lookups, library.path, ids, args.seconds)
        scaling, waits = [], []
        for number in range(args.rounds):
            one = run(1, look)
            many = run(args.processes, look, partial(puts, library.path, args.seconds))
            spins = run(args.processes, partial(spin, args.seconds, 1 / rate(one[0])), partial(spin, args.seconds, 1.0))
            scaling.append(sum(map(efficiency, many[:-1])) / args.processes / efficiency(one[0]))
            waits.append(max(found["slept"] for found in many[:-1]) * 1e3)
            slowest, turn = (max(found["slowest"] for found in some[:-1]) * 1e3 for some in (many, spins))
            report.note(
                f"round {number + 1}: {args.processes} processes, beside {rate(many[-1]):.0f} puts a second",
                f"{sum(map(rate, many[:-1])):,.0f} lookups a second (one alone {rate(one[0]):,.0f}), for a second of "
                f"processor time {scaling[-1]:.2f} of those of one alone; the slowest {slowest:.1f} ms, of those that "
                f"slept {waits[-1]:.1f} ms; without a library {turn:.1f} ms",
            )
    what = f"{args.processes} processes and one that puts"
    median = float(np.median(scaling))
    report.bars.append(Bar(f"lookups in a second of processor time, {what}, of one alone", SAME, median, "x"))
    report.bars.append(Bar(f"longest sleep of a lookup, {what}", LONGEST_WAIT, max(waits), "ms"))
    report.finish(args.json)


def efficiency(found: dict[str, float]) -> float:
    """Lookups in a second of processor time."""
    return found["count"] / found["processor"]


def rate(found: dict[str, float]) -> float:
    """Lookups a second of one process."""
    return found["count"] / found["seconds"]


def run(count: int, work: Callable[[int], Any], beside: Callable[[int], Any] | None = None) -> list[dict[str, float]]:
    """Run so many processes at once, and maybe another; return what each found, that of the other last."""
    context = multiprocessing.get_context("spawn")
    jobs = [work] * count + ([] if beside is None else [beside])
    with context.Pool(len(jobs)) as pool:
        pool.map(time.sleep, [0.2] * len(jobs), chunksize=1)  # all of them run
        return [found.get() for found in [pool.apply_async(job, (number,)) for number, job in enumerate(jobs)]]


def timed(seconds: float, act: Callable[[], object]) -> dict[str, float]:
    """Do something again and again; return how often, the longest time, and the longest in which it slept."""
    slowest = slept = 0.0
    count = 0
    began, before = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        switches, start = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.perf_counter()
        act()
        took = time.perf_counter() - start
        slowest, count = max(slowest, took), count + 1
        if resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw > switches:
            slept = max(slept, took)
    spent = time.process_time() - before
    return {
        "slowest": slowest,
        "slept": slept,
        "count": count,
        "seconds": time.perf_counter() - began,
        "processor": spent,
    }


def lookups(path: str, ids: np.ndarray, seconds: float, number: int) -> dict[str, float]:
    with kvmmap.Library(path) as library:
        return timed(seconds, lambda: library.match(NAMESPACE, ids[: PROMPT + number]))


def puts(path: str, seconds: float, number: int) -> dict[str, float]:
    """Store prompts of 3,000 tokens, and evict as many."""
    random, rows = np.random.default_rng(number), np.ones((2, 3000, 1, 16), np.float32)

    def put() -> None:
        ids = random.integers(0, 50_000, 3000)
        with library.session(NAMESPACE, ids) as session:
            session.extend(rows, rows, ids)
        library.evict(library.stats().bytes - 1)

    with kvmmap.Library(path) as library:
        return timed(seconds, put)


def spin(seconds: float, long: float, number: int) -> dict[str, float]:
    """Compute for as long as a lookup takes, again and again."""

    def compute() -> None:
        end = time.process_time() + long
        while time.process_time() < end:
            pass

    return timed(seconds, compute)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
