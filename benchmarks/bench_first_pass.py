"""The first attention over all layers of a file after opening it, relative to a later one.

    python benchmarks/bench_first_pass.py [--rounds 11] [--length 7900] [--json FILE]

The file is in the page cache: what the first pass has besides is mapping its pages and hashing its blocks. Its shape is
SmolLM2-135M's: 30 layers of 3 KV heads x 64, three query heads each. Attention by one thread, processor times.
"""

from __future__ import annotations

import os
from time import process_time

from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

LAYERS, HEADS, DIM, GROUP = 30, 3, 64, 3
LIMIT = 1.5
"""The first pass, relative to a later one."""


def main() -> None:
    parser = arguments("Benchmark the first pass after opening.", rounds=11)
    parser.add_argument("--length", type=int, default=7_900, help="positions")
    args = parser.parse_args()
    report = Report("first_pass")
    report.note("shape", f"{args.length:,} positions, {LAYERS} layers of {HEADS} KV heads x {DIM}")
    with workspace(args.dir) as folder:
        path = os.path.join(folder, "cache.kvm")
        rows = gaussian(args.length, HEADS, DIM)
        with kvmmap.create(path, num_layers=LAYERS, capacity=args.length, num_kv_heads=HEADS, head_dim=DIM) as cache:
            for layer in cache.layers:
                layer.extend(rows, rows)
        report.note("megabytes", round(os.stat(path).st_blocks * 512 / 1e6, 1))
        opened: list[kvmmap.QuantizedKvCache] = []
        queries = gaussian(1, HEADS * GROUP, DIM, seed=1)

        def reopen(verify: str) -> None:
            while opened:
                opened.pop().close()
            opened.append(kvmmap.open(path, verify=verify))

        def attend() -> None:
            for layer in opened[0].layers:
                layer.attend(queries, threads=1)

        tasks = [
            Task(name="first pass", before=lambda: reopen("read"), run=attend),
            Task(name="later pass", run=attend),
            Task(name="first pass, no checksums", before=lambda: reopen("none"), run=attend),
        ]
        found = measure(tasks, args.rounds, clock=process_time)
        reopen("none")
        opened.pop().close()
    report.show("attention over all layers", found, ["later pass"])
    ratio = 1 / found.ratio("first pass", "later pass").median
    report.bars.append(Bar("the first pass, relative to a later one", LIMIT, ratio, "x at most"))
    report.finish(args.json)


if __name__ == "__main__":
    main()
