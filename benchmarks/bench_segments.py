"""Attention over a chain of files relative to one file, in one call and merged by log-sum-exp; and opening chains.

    python benchmarks/bench_segments.py [--rounds 45] [--length 32768] [--json FILE]

A chain has four files, cut where no tile of the kernels ends; the same rows are in one file. There are three of both,
which take turns: where pages lie in memory makes more difference than what is measured. All pages are in memory.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

HEADS, DIM = 8, 128
FILES, SETS = 4, 3
MOST = 1.05
"""Of one file's time, that a chain of four may take."""
WORDS = np.zeros(64 << 20)


def main() -> None:
    parser = arguments("Benchmark chains of files.", rounds=45)
    parser.add_argument("--length", type=int, default=32_768, help="positions")
    args = parser.parse_args()
    report = Report("segments")
    report.note("shape", f"{args.length:,} positions in {FILES} files, {HEADS} KV heads, head_dim {DIM}; one thread")
    with workspace(args.dir) as folder, ExitStack() as stack:
        paths = [make(folder / str(number), args.length) for number in range(SETS)]
        opened = [[stack.enter_context(kvmmap.open(path)).layers[0] for path in pair] for pair in paths]
        edges = list(cuts(args.length))
        for n, group in ((1, 1), (1, 4), (1, 8), (16, 4)):
            attention(report, opened, edges, n, group, args.rounds)
        opening(report, *paths[0], args.rounds)
    report.finish(args.json)


def cuts(length: int) -> Sequence[int]:
    """Where the files of a chain begin, and where the last one ends."""
    return [length * number // FILES + 37 * number for number in range(FILES)] + [length]


def make(folder: Path, length: int) -> tuple[Path, Path]:
    """Make one file, and a chain of four with the same rows; return the paths of the one and of the chain's last."""
    folder.mkdir()
    keys, values = gaussian(length, HEADS, DIM)[None], gaussian(length, HEADS, DIM, seed=1)[None]
    shape = {"num_layers": 1, "capacity": length, "num_kv_heads": HEADS, "head_dim": DIM}
    with kvmmap.create(folder / "whole.kvm", **shape) as cache:
        cache.extend(keys, values)
    path = folder / "0.kvm"
    for number, (start, stop) in enumerate(itertools.pairwise(cuts(length))):
        parent, path = path, folder / f"{number}.kvm"
        with kvmmap.create(path, parent=parent) if number else kvmmap.create(path, **shape) as cache:
            cache.extend(keys[:, start:stop], values[:, start:stop])
    return folder / "whole.kvm", path


def attention(
    report: Report,
    opened: Sequence[Sequence[kvmmap.QuantizedKvLayer]],
    edges: list[int],
    n: int,
    group: int,
    rounds: int,
) -> None:
    queries = gaussian(n, HEADS * group, DIM, seed=2)
    out = np.empty_like(queries)

    def in_one_call(layer: kvmmap.QuantizedKvLayer) -> None:
        layer.attend(queries, out=out, threads=1)

    def merged(layer: kvmmap.QuantizedKvLayer) -> None:
        parts = [
            layer.attend(queries, positions=part, return_lse=True, threads=1) for part in itertools.pairwise(edges)
        ]
        kvmmap.merge_attention(*zip(*parts, strict=True))

    tasks = [
        taking_turns("one file", in_one_call, [whole for whole, _ in opened]),
        taking_turns("chain", in_one_call, [chain for _, chain in opened]),
        taking_turns("merged", merged, [whole for whole, _ in opened]),
    ]
    found = measure(tasks, rounds, time.process_time)
    title = f"{n} quer{'ies' if n > 1 else 'y'}, {group} query head{'s' * (group > 1)} a KV head"
    report.show(title, found, ["one file"])
    cost = found.ratio("one file", "chain").median
    report.bars.append(Bar(f"{title}: chain of {FILES}, of one file", MOST, cost, "x at most"))
    report.note(f"{title}: merged by log-sum-exp, of one file", f"{found.ratio('one file', 'merged').median:.3f}")


def taking_turns(
    name: str, act: Callable[[kvmmap.QuantizedKvLayer], None], layers: Sequence[kvmmap.QuantizedKvLayer]
) -> Task:
    """A task over one layer after the other, none of which is in the processor's caches."""
    turns = itertools.cycle(layers)
    current = [layers[0]]

    def before() -> None:
        current[0] = next(turns)
        WORDS.sum()

    return Task(name=name, run=lambda: act(current[0]), before=before)


def opening(report: Report, whole: Path, chain: Path, rounds: int) -> None:
    tasks = [
        Task(name="one file", run=lambda: kvmmap.open(whole).close()),
        Task(name="chain", run=lambda: kvmmap.open(chain).close()),
    ]
    found = measure(tasks, rounds, time.process_time)
    report.show("open and close", found, ["one file"])
    report.note("opening a chain of four, of one file", f"{found.ratio('one file', 'chain').median:.2f}")


if __name__ == "__main__":
    main()
