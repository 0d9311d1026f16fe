"""Attention in place over each preset's rows, relative to int8's: one thread, processor times in alternation.

    python benchmarks/bench_presets.py [--positions 8192] [--rounds 15] [--json FILE]

8 KV heads x 128, one query with one and with four query heads a KV head; without recent windows, whose cost
bench_recent.py measures.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
from harness import Bar, Report, Task, arguments, gaussian, measure

import kvmmap

HEADS, DIM = 8, 128
AT_MOST = {
    "int8-rotated": (1.03, 1.03),
    "K8/V4": (0.9, 1.0),
    "K5/V4": (0.8, 1.0),
    "K4/V4": (0.7, 1.0),
}
"""By codecs: of int8's time, with one query head a KV head and with four."""

CODECS = {
    "int8": ("int8", "int8"),
    "int8-rotated": ("int8-rotated", "int8-rotated"),
    "K8/V4": ("int8-rotated", "int4-rotated"),
    "K5/V4": ("int5-rotated", "int4-rotated"),
    "K4/V4": ("int4-rotated", "int4-rotated"),
}
"""Of keys and of values."""


def main() -> None:
    parser = arguments("Benchmark attention over the rows of each preset.", rounds=15)
    parser.add_argument("--positions", type=int, default=8192)
    args = parser.parse_args()
    report = Report("presets")
    keys, values = gaussian(args.positions, HEADS, DIM), gaussian(args.positions, HEADS, DIM, seed=1)
    layers = {}
    for name, (of_keys, of_values) in CODECS.items():
        layers[name] = kvmmap.QuantizedKvLayer(args.positions, HEADS, DIM, key_codec=of_keys, value_codec=of_values)
        layers[name].extend(keys, values)
    for number, group in enumerate((1, 4)):
        queries = gaussian(1, HEADS * group, DIM, seed=2)
        out = np.empty_like(queries)
        tasks = [
            Task(name=name, run=partial(attend, layer, queries, out), calls=CALLS) for name, layer in layers.items()
        ]
        measured = measure(tasks, args.rounds, time.process_time)
        heads = f"{group} query head{'s' * (group > 1)} a KV head"
        report.show(f"attention over {args.positions:,} positions, {heads}", measured, ["int8"])
        for name, most in AT_MOST.items():
            cost = 1 / measured.ratio(name, "int8").median
            report.bars.append(Bar(f"{name}, {heads}: time of int8's", most[number], cost, "x at most", beside="int8"))
    report.finish(args.json)


CALLS = 5


def attend(layer: kvmmap.QuantizedKvLayer, queries: np.ndarray, out: np.ndarray) -> None:
    for _ in range(CALLS):
        layer.attend(queries, out=out, threads=1)


if __name__ == "__main__":
    main()
