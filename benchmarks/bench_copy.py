"""Copying a cache to another file, beside `cp --sparse=always` followed by a sync of the copy.

    python benchmarks/bench_copy.py [--rounds 7] [--json FILE]

kvmmap compares the copy with the source's checksums besides, unless verify=False. Both end when the copy is durable.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

LAYERS, HEADS, DIM, TOKENS = 16, 8, 128, 8_192


def main() -> None:
    args = arguments("Benchmark copying a cache to another file.", rounds=7).parse_args()
    report = Report("copy")
    with workspace(args.dir) as folder:
        source, target = folder / "source.kvm", folder / "target.kvm"
        rows = gaussian(1024, HEADS, DIM)
        with kvmmap.create(source, num_layers=LAYERS, capacity=TOKENS, num_kv_heads=HEADS, head_dim=DIM) as cache:
            for layer in cache.layers:
                while len(layer) < TOKENS:
                    layer.extend(rows, rows)

        def before() -> None:
            target.unlink(missing_ok=True)

        size = LAYERS * HEADS * DIM * TOKENS * 2 * 4
        baseline = "cp --sparse=always, and sync"
        ways = {
            baseline: lambda: copy_by_system(source, target),
            "kvmmap.copy": lambda: kvmmap.copy(source, target),
            "kvmmap.copy, verify=False": lambda: kvmmap.copy(source, target, verify=False),
        }
        tasks = [Task(name=name, run=run, before=before, f32_bytes=size) for name, run in ways.items()]
        found = measure(tasks, args.rounds)
    report.show(f"{LAYERS} layers of {TOKENS:,} positions, {HEADS} x {DIM}", found, [baseline])
    report.bars.append(
        Bar("kvmmap.copy against cp and sync", 0.9, found.ratio("kvmmap.copy", baseline).median, "x", beside=baseline)
    )
    report.finish(args.json)


def copy_by_system(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
