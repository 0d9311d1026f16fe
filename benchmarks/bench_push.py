"""One token's keys and values appended to one layer, as in decoding, in a short and in a long cache.

    python benchmarks/bench_push.py [--rounds 15] [--json FILE]

Each run pushes a few hundred positions in a Python loop, on from where the last one stopped, so that they land in fresh
pages; a time is that of one push of keys and values together. memcpy is the same loop with np.copyto of the same rows
into memory. Formats that can't append (safetensors, torch.save) rewrite everything.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from baselines import new_memmap, save_safetensors, save_torch
from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

HEADS, DIM = 8, 128
SHORT, LONG = 1_000, 100_000
PUSHES = 300
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
LAYERS = 32
"""Of the cache that whole steps are pushed to."""


def main() -> None:
    args = arguments("Benchmark appending token by token.", rounds=15).parse_args()
    report = Report("push")
    room = PUSHES * (args.rounds + 2)
    with workspace(args.dir) as folder:
        caches = {length: filled(folder / f"{length}.kvm", length, room) for length in (SHORT, LONG)}
        narrow = filled(folder / "bf16.kvm", SHORT, room)
        memory = kvmmap.QuantizedKvLayer(SHORT + room, HEADS, DIM)
        steps = kvmmap.create(folder / "steps.kvm", num_layers=LAYERS, capacity=room, num_kv_heads=HEADS, head_dim=DIM)
        maps = {length: Memmaps(folder / f"map{length}", length, room) for length in (SHORT, LONG)}
        measured = measure(
            [
                memcpy(),
                *(pushing(f"kvmmap, f32, at {n:,}", cache.layers[0].push) for n, cache in caches.items()),
                pushing(f"kvmmap, bf16, at {SHORT:,}", narrow.layers[0].push, BF16),
                pushing("kvmmap, f32, in memory", memory.push),
                stepping(f"kvmmap, push_step of {LAYERS} layers, a layer", steps),
                *(pushing(f"np.memmap f16, at {n:,}", pair.push) for n, pair in maps.items()),
            ],
            args.rounds,
        )
        saved = measure([memcpy(), *saving(folder)], args.rounds)  # apart: writing it all back disturbs the others
        for cache in (*caches.values(), narrow, steps):
            cache.close()
    report.show(f"push one position, {HEADS} x {DIM} keys and values, to one layer", measured, ["memcpy"])
    report.show(f"one position more, where all {SHORT:,} of a layer are saved again", saved, ["memcpy"])
    short, long = (f"kvmmap, f32, at {length:,}" for length in (SHORT, LONG))
    report.bars += [
        Bar(f"push to a file at {SHORT:,} positions", 12, measured.time(short).median * 1e6, "us"),
        Bar(f"push to a file at {LONG:,} positions", 12, measured.time(long).median * 1e6, "us"),
        Bar(f"push at {LONG:,} against {SHORT:,} positions", 1.25, measured.ratio(short, long).median, "x at most"),
    ]
    report.finish(args.json)


def filled(path: Path, length: int, room: int) -> kvmmap.QuantizedKvCache:
    """A one-layer cache of `length` positions, committed, with room for more."""
    cache = kvmmap.create(path, num_layers=1, capacity=length + room, num_kv_heads=HEADS, head_dim=DIM)
    rows = gaussian(1000, HEADS, DIM)
    while len(cache.layers[0]) < length:
        cache.layers[0].extend(rows, rows)
    cache.flush()
    return cache


class Memmaps:
    """Keys and values as f16 in files of np.memmap, with a length that only this process knows."""

    def __init__(self, path: Path, length: int, room: int) -> None:
        self.keys, self.values = (
            new_memmap(path.with_suffix(suffix), (length + room, HEADS, DIM)) for suffix in (".k", ".v")
        )
        self.length = length

    def push(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys[self.length] = keys
        self.values[self.length] = values
        self.length += 1


def pushing(name: str, push: Callable[[np.ndarray, np.ndarray], object], dtype: np.dtype = F32) -> Task:
    """Push the same rows over and over."""
    keys, values = (gaussian(HEADS, DIM, seed=seed).astype(dtype) for seed in (0, 1))

    def run() -> None:
        for _ in range(PUSHES):
            push(keys, values)

    return Task(name=name, run=run, calls=PUSHES)


def memcpy() -> Task:
    out = np.zeros((2, PUSHES, HEADS, DIM), np.float32)
    place = count()

    def copy(keys: np.ndarray, values: np.ndarray) -> None:
        position = next(place) % PUSHES
        np.copyto(out[0, position], keys)
        np.copyto(out[1, position], values)

    return pushing("memcpy", copy)


def stepping(name: str, cache: kvmmap.QuantizedKvCache) -> Task:
    """Whole steps; a time is a layer's share."""
    keys, values = (gaussian(LAYERS, HEADS, DIM, seed=seed) for seed in (0, 1))
    tokens = PUSHES // LAYERS

    def run() -> None:
        for token in range(tokens):
            cache.push_step(keys, values, token)

    return Task(name=name, run=run, calls=tokens * LAYERS)


def saving(folder: Path) -> list[Task]:
    """Rewrite one layer of the short cache."""
    keys, values = (gaussian(SHORT, HEADS, DIM, seed=seed) for seed in (0, 1))
    tensors = [torch.from_numpy(rows) for rows in (keys, values)]
    return [
        Task(name=f"safetensors save_file, {SHORT:,}", run=lambda: save_safetensors(folder / "st", keys, values)),
        Task(name=f"torch.save, {SHORT:,}", run=lambda: save_torch(folder / "pt", *tensors)),
    ]


if __name__ == "__main__":
    main()
