"""The cost of verifying blocks on first read: opening, the first attention, and generation.

    python benchmarks/bench_verify.py [--rounds 9] [--length 32768] [--tokens 100] [--json FILE]

The same file, in the page cache, opened with verify="none", "read" (the default) and "open". Attention by one thread,
four query heads a KV head, over each of a few layers a token, as in generating text. Hashing is compared with reading
the same bytes as 64-bit words, by numpy. Times are processor times.
"""

from __future__ import annotations

import os
from time import process_time
from typing import Any

import numpy as np
import xxhash
from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

HEADS, DIM, GROUP, LAYERS = 8, 128, 4, 4
LIMIT = 1.05
"""Time with checksums over time without, of generating so many tokens."""


def main() -> None:
    parser = arguments("Benchmark checksums at first touch.", rounds=9)
    parser.add_argument("--length", type=int, default=32_768, help="positions")
    parser.add_argument("--tokens", type=int, default=100, help="steps of attention after opening")
    args = parser.parse_args()
    report = Report("verify")
    report.note(
        "shape", f"{args.length:,} positions, {LAYERS} layers of {HEADS} KV heads x {DIM}, {GROUP} query heads each"
    )
    with workspace(args.dir) as folder:
        path = os.path.join(folder, "cache.kvm")
        make(path, args.length)
        hashing(report, path, args.rounds)
        opening(report, path, args.rounds)
        generating(report, path, args.rounds, args.tokens)
        single_rows(report, path, args.rounds)
    report.finish(args.json)


def make(path: str, length: int) -> None:
    part = min(length, 8192)
    keys = gaussian(part, HEADS, DIM)
    with kvmmap.create(path, num_layers=LAYERS, capacity=length, num_kv_heads=HEADS, head_dim=DIM) as cache:
        while cache.seq_len < length:
            count = min(part, length - cache.seq_len)
            cache.extend([keys[:count]] * LAYERS, [keys[:count]] * LAYERS, np.arange(count))


def hashing(report: Report, path: str, rounds: int) -> None:
    with kvmmap.open(path, verify="none") as cache:
        arrays = list(cache.layers[0].read_quantized())
        words = [array.reshape(-1).view(np.uint64) for array in arrays]
        size = cache.geometry.block_tokens

        def blocks() -> None:
            for array in arrays:
                for start in range(0, len(array), size):
                    xxhash.xxh3_64_intdigest(array[start : start + size].data)

        tasks = [
            Task(name="read", run=lambda: [array.sum() for array in words]),
            Task(name="xxh3, block by block", run=blocks),
            Task(name="xxh3, whole slabs", run=lambda: [xxhash.xxh3_64_intdigest(array.data) for array in arrays]),
        ]
        report.show("hashing one layer", measure(tasks, rounds, process_time), ["read"])


def opening(report: Report, path: str, rounds: int) -> None:
    ways: tuple[Any, ...] = ("none", "read", "open")
    tasks = [
        Task(
            name=f"open, {way}",
            run=lambda way=way: [kvmmap.open(path, verify=way).close() for _ in range(20)],
            calls=20,
        )
        for way in ways
    ]
    report.show("opening and closing, a file that was closed", measure(tasks, rounds, process_time), ["open, none"])


def generating(report: Report, path: str, rounds: int, tokens: int) -> None:
    queries = gaussian(1, HEADS * GROUP, DIM, seed=2)
    out = np.empty_like(queries)

    def attend(way: Any, count: int) -> None:
        with kvmmap.open(path, verify=way) as cache:
            for _ in range(count):
                for layer in cache.layers:
                    layer.attend(queries, out=out, threads=1)

    for title, count in (("the first token", 1), (f"{tokens} tokens", tokens)):
        tasks = [Task(name=way, run=lambda way=way, count=count: attend(way, count)) for way in ("none", "read")]
        found = measure(tasks, rounds, process_time)
        report.show(f"opening, and attention for {title}", found, ["none"])
        if count > 1:
            cost = 1 / found.ratio("read", "none").median
            report.bars.append(Bar(f"{title} with checksums, of the time without", LIMIT, cost, "x at most"))
    # What the book-keeping costs once all is verified, where attention costs least.
    with kvmmap.open(path, verify="none") as bare, kvmmap.open(path) as verified:
        for cache in (bare, verified):
            cache.layers[0].read_keys()
        tasks = [
            Task(
                name=name,
                run=lambda layer=cache.layers[0]: [
                    layer.attend(queries, out=out, threads=1, positions=(0, 256)) for _ in range(50)
                ],
                calls=50,
            )
            for name, cache in (("none", bare), ("read", verified))
        ]
        report.show("attention over one block, again and again", measure(tasks, 3 * rounds, process_time), ["none"])


def single_rows(report: Report, path: str, rounds: int) -> None:
    with kvmmap.open(path, verify="none") as bare, kvmmap.open(path) as verified:
        tasks = [
            Task(name=name, run=lambda layer=cache.layers[0]: [layer.get_key(5, 1) for _ in range(500)], calls=500)
            for name, cache in (("none", bare), ("read", verified))
        ]
        report.show("get_key of a block that was read before", measure(tasks, 3 * rounds, process_time), ["none"])


if __name__ == "__main__":
    main()
