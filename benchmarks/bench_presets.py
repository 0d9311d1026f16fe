"""Attention in place over each preset's rows, relative to int8's: one thread, processor times in alternation.

    python benchmarks/bench_presets.py [--positions 32768] [--placements 3] [--rounds 15] [--json FILE]

8 KV heads x 128, one query with one and with four query heads a KV head; without recent windows, whose cost
bench_recent.py measures.

A decoding step reads rows that no cache has: other layers were read since. So the rows of each layer are larger than a
thread's share of the last cache (67 MB of int8), and each round walks over all of them in turn. How fast a layer is
read depends on where its pages lie in memory, and on what was read before it, by more than what is measured: each codec
has several layers of the same rows, walked in other orders, and a ratio is the median over the rounds of all. Over rows
that stay in a cache (`--positions 816` fits a second-level cache of 2 MB) codes of fewer bits have less to gain.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
from harness import Bar, Measured, Report, Task, arguments, gaussian, measure

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
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--placements", type=int, default=3, help="layers of each codec, which lie elsewhere in memory")
    args = parser.parse_args()
    report = Report("presets")
    keys, values = gaussian(args.positions, HEADS, DIM), gaussian(args.positions, HEADS, DIM, seed=1)
    placements = [layers_of(keys, values, 2 * number) for number in range(args.placements)]
    del keys, values
    for number, group in enumerate((1, 4)):
        queries = gaussian(1, HEADS * group, DIM, seed=2)
        out = np.empty_like(queries)
        measured = joined(
            [
                measure(
                    [
                        Task(name=name, run=partial(attend, layer, queries, out), calls=CALLS)
                        for name, layer in layers.items()
                    ],
                    args.rounds,
                    time.process_time,
                )
                for layers in placements
            ]
        )
        heads = f"{group} query head{'s' * (group > 1)} a KV head"
        report.show(f"attention over {args.positions:,} positions, {heads}", measured, ["int8"])
        for name, most in AT_MOST.items():
            cost = 1 / measured.ratio(name, "int8").median
            report.bars.append(Bar(f"{name}, {heads}: time of int8's", most[number], cost, "x at most", beside="int8"))
    report.finish(args.json)


CALLS = 3


def layers_of(keys: np.ndarray, values: np.ndarray, start: int) -> dict[str, kvmmap.QuantizedKvLayer]:
    """A layer of the same rows for each pair of codecs, the pair of number `start` first."""
    layers = {}
    for name in [list(CODECS)[(start + i) % len(CODECS)] for i in range(len(CODECS))]:
        of_keys, of_values = CODECS[name]
        layers[name] = kvmmap.QuantizedKvLayer(len(keys), HEADS, DIM, key_codec=of_keys, value_codec=of_values)
        layers[name].extend(keys, values)
    return layers


def joined(parts: list[Measured]) -> Measured:
    """The rounds of all parts, which measured tasks of the same names."""
    tasks = parts[0].tasks
    return Measured(tasks, {name: [seconds for part in parts for seconds in part.seconds[name]] for name in tasks})


def attend(layer: kvmmap.QuantizedKvLayer, queries: np.ndarray, out: np.ndarray) -> None:
    for _ in range(CALLS):
        layer.attend(queries, out=out, threads=1)


if __name__ == "__main__":
    main()
