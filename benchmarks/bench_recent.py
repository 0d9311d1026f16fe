"""What rows in 16 bits cost: a push and attention with and without, and what they lose less.

    python benchmarks/bench_recent.py [--positions 8192] [--window 128] [--sinks 4]

Prints processor time without and with them, in alternation, and the ratio; means over lengths, since kernels work in
tiles and one length may suit one of the two better. Of pushes to a file medians, of rounds so long that records are
written in many of them. One thread, one query. Cases are (KV heads, query heads a KV head, head_dim). Behind the ratio
of a push stands what it would be if the rows in 16 bits had only to be copied: to memory, or to memory and to a mapped
file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bar, Report, arguments

import kvmmap

CASES = ((3, 3, 64), (8, 1, 128), (8, 4, 128))
CODECS = ("int8", "int8-rotated", "int4-rotated")
LENGTHS = 8
TOGETHER = 16
"""Positions whose rows are written to a file at once."""
ROUNDS = 12
PUSHES, PUSHES_TO_FILE = 256, 4096
"""In a round."""
DEFAULT = "int8-rotated"
"""The codec of the default preset, which is what the bars are for."""

MOST = 1.03
WHAT = ("attention over 8k positions", "push in memory", "push to a file")
Pair = tuple[float, float]
"""Microseconds without and with."""


def main() -> None:
    parser = arguments("Measure what rows in 16 bits cost.", rounds=ROUNDS)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    args = parser.parse_args()
    report = Report("recent")
    print(f"{'case':12} {'codec':14} {'attention':>24} {'push':>29} {'push to a file':>29}   us without, with, ratio")
    for heads, group, dim in CASES:
        for codec in CODECS:
            kinds = ((0, 0), (args.window, args.sinks))
            found = [attention(heads, group, dim, codec, kinds, args.positions, args.rounds)]
            found += [pushes(heads, dim, codec, kinds, args.rounds, to_file=to_file) for to_file in (False, True)]
            case = f"{heads}x{dim} g{group}"
            copied = [
                None,
                *(copying(heads, dim, args.window, args.rounds, to_file=to_file) for to_file in (False, True)),
            ]
            cells = [cell(*pair, copy) for pair, copy in zip(found, copied, strict=True)]
            print(f"{case:12} {codec:14} " + " ".join(cells), flush=True)
            report.notes[f"{case}, {codec}"] = dict(zip(WHAT, found, strict=True))
            if (heads, group, codec) == (8, 1, DEFAULT):
                for what, (without, with_) in zip(WHAT, found, strict=True):
                    bar = f"{what} with window and sinks, {codec}, 8 KV heads x 128"
                    report.bars.append(Bar(bar, MOST, with_ / without, "x at most", beside="the same without"))
    report.finish(args.json)


def attention(heads: int, group: int, dim: int, codec: str, kinds: Any, positions: int, rounds: int) -> Pair:
    """One query over a whole layer."""
    rows = np.random.default_rng(0).standard_normal((positions + 272, heads, dim), np.float32)
    query = np.random.default_rng(1).standard_normal((1, heads * group, dim), np.float32)
    layers = [
        kvmmap.QuantizedKvLayer(
            len(rows), heads, dim, key_codec=codec, value_codec=codec, recent_window=window, sinks=sinks
        )
        for window, sinks in kinds
    ]
    best: list[list[float]] = [[], []]
    for length in np.linspace(positions, positions + 271, LENGTHS).astype(int):
        for layer in layers:
            layer.extend(rows[len(layer) : length], rows[len(layer) : length])
        times = alternately([lambda layer=layer: layer.attend(query, threads=1) for layer in layers], 4, rounds)
        for found, time_ in zip(best, times, strict=True):
            found.append(time_)
    return statistics.mean(best[0]), statistics.mean(best[1])


def pushes(heads: int, dim: int, codec: str, kinds: Any, rounds: int, *, to_file: bool) -> Pair:
    """One position of one layer."""
    row = np.random.default_rng(0).standard_normal((heads, dim), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        repeat = PUSHES_TO_FILE if to_file else PUSHES
        shape: dict[str, Any] = {"num_layers": 1, "capacity": repeat * rounds, "num_kv_heads": heads, "head_dim": dim}
        caches = []
        for number, (window, sinks) in enumerate(kinds):
            more = {"key_codec": codec, "value_codec": codec, "recent_window": window, "sinks": sinks}
            path = Path(folder) / f"{number}.kvm"
            made = kvmmap.create(path, **shape, **more) if to_file else kvmmap.QuantizedKvCache(**shape, **more)
            caches.append(made)
        layers = [cache.layers[0] for cache in caches]
        best = statistics.median if to_file else min
        times = alternately([lambda layer=layer: layer.push(row, row) for layer in layers], repeat, rounds, best)
        for cache in caches:
            cache.close()
    return times


def copying(heads: int, dim: int, window: int, rounds: int, *, to_file: bool) -> float:
    """Return the microseconds of copying a position's rows in 16 bits alone into a ring, and into one in a file."""
    numbers, slots = 2 * heads * dim, -(-window // TOGETHER) * TOGETHER
    rows = np.zeros((TOGETHER, numbers), np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        rings = [np.zeros((slots // TOGETHER, *rows.shape), np.uint16)]
        if to_file:
            rings.append(np.memmap(Path(folder) / "ring", np.uint16, "w+", shape=rings[0].shape))

        def copy() -> None:
            for ring in rings:
                ring[...] = rows

        return alternately([copy, copy], 4, rounds)[0] / slots


def alternately(
    runs: list[Callable[[], Any]], repeat: int, rounds: int, best: Callable[[list[float]], float] = min
) -> Pair:
    """Return the processor time of both, in microseconds: the shortest of rounds of both, or what `best` gives."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for times, run in zip(found, runs, strict=True):
            begun = time.thread_time()
            for _ in range(repeat):
                run()
            times.append((time.thread_time() - begun) / repeat * 1e6)
    return best(found[0]), best(found[1])


def cell(without: float, with_: float, copied: float | None) -> str:
    """Return the figures of a pair, and the ratio if the rows in 16 bits were only copied, in so many microseconds."""
    floor = "" if copied is None else f" ({1 + copied / without:.2f})"
    return f"{without:8.2f} {with_:8.2f} {with_ / without:5.3f}{floor}"


if __name__ == "__main__":
    main()
