"""From a path to the first row: caches of 32 layers, 8 x 128, at three lengths.

    python benchmarks/bench_reopen.py [--rounds 25] [--full] [--json FILE]

A run opens the file, reads position 0 and the last position of the last layer, and closes it again. By default only the
first and the last 256 positions of every layer are real rows, and the range between them is a hole, so that 128k tokens
take no 9 GB of disk; `--full` stores them all. Files are in the page cache as far as the run before left them there.
Formats of other libraries hold f16; where one is opened lazily, its file is a hole but for its header.

Opening alone, and closing, is measured as well: of one file again and again, whose layout kvmmap remembers, and of more
files of different capacities than it remembers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from baselines import load_torch
from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

LAYERS, HEADS, DIM = 32, 8, 128
LENGTHS = (1_024, 32_768, 131_072)
OPENINGS = 10
OPENING, OTHERS = "kvmmap, open {} layers again", "kvmmap, open 30 layers of another capacity"
SHORT, LONG = LENGTHS[0], LENGTHS[-1]
EDGE = 256
"""Positions at either end that are real in a file with a hole."""


def main() -> None:
    parser = arguments("Benchmark opening a saved cache.", rounds=25)
    parser.add_argument("--full", action="store_true", help="store all positions: 12 GB")
    args = parser.parse_args()
    report = Report("reopen")
    with workspace(args.dir) as folder:
        paths = {length: folder / f"{length}.kvm" for length in LENGTHS}
        for length, path in paths.items():
            make_cache(path, length, full=args.full)
            report.note(f"{length:,} tokens, on disk", f"{path.stat().st_blocks * 512 / 1e6:,.0f} MB")
        row = np.zeros(HEADS * DIM * 4, np.uint8), gaussian(HEADS, DIM).view(np.uint8).reshape(-1)
        tasks = [
            Task(name="memcpy of one row", run=lambda: np.copyto(*row)),
            *(Task(name=f"kvmmap at {n:,}", run=partial(first_row, path)) for n, path in paths.items()),
            *(Task(name=f"kvmmap to append, at {n:,}", run=partial(writer, path)) for n, path in paths.items()),
            *opening_tasks(folder),
            *memmap_tasks(folder),
            *loader_tasks(folder),
        ]
        measured = measure(tasks, args.rounds)
    report.show(f"open {LAYERS} layers, {HEADS} x {DIM}, and read a first row", measured, [f"kvmmap at {LONG:,}"])
    short, long = f"kvmmap at {SHORT:,}", f"kvmmap at {LONG:,}"
    report.bars += [
        Bar(f"reopen {LONG:,} tokens to the first row", 1, measured.time(long).median * 1e3, "ms"),
        Bar(f"reopen {LONG:,} against {SHORT:,} tokens", 2, measured.ratio(short, long).median, "x at most"),
        Bar("open 32 layers", 0.3, measured.time(OPENING.format(32)).median * 1e3, "ms"),
        Bar("open 80 layers", 0.5, measured.time(OPENING.format(80)).median * 1e3, "ms"),
        Bar("open 30 layers of another capacity", 0.7, measured.time(OTHERS).median * 1e3, "ms"),
    ]
    report.finish(args.json)


def make_cache(path: Path, length: int, *, full: bool) -> None:
    """Write a committed cache of `length` positions, all of them or only its ends."""
    rows = gaussian(LAYERS, EDGE, HEADS, DIM)
    with kvmmap.create(path, num_layers=LAYERS, capacity=length, num_kv_heads=HEADS, head_dim=DIM) as cache:
        cache.extend(rows, rows)
        if not full:
            # The public API cannot store holes, so the storage is called as a cache would call it.
            for store in cache._storage.layers:
                store.publish(length - EDGE)
        while cache.seq_len < length:
            cache.extend(rows, rows)


def first_row(path: Path) -> None:
    with kvmmap.open(path) as cache:
        layer = cache.layers[LAYERS - 1]
        layer.get_keys_at(0)
        layer.get_values_at(len(layer) - 1)


def writer(path: Path) -> None:
    """Open it for appending, including recovery and locking."""
    with kvmmap.open(path, "a") as cache:
        layer = cache.layers[LAYERS - 1]
        layer.get_keys_at(0)
        layer.get_values_at(len(layer) - 1)


def opening_tasks(folder: Path) -> list[Task]:
    """Opening alone, of caches of SmolLM2's shape."""

    def make(layers: int, capacity: int) -> Path:
        path = folder / f"{layers}-{capacity}.kvm"
        rows = gaussian(layers, 8, 3, 64)
        with kvmmap.create(path, num_layers=layers, capacity=capacity, num_kv_heads=3, head_dim=64) as cache:
            cache.extend(rows, rows)
        return path

    def reopen(paths: Iterator[Path]) -> None:
        for _ in range(OPENINGS):
            kvmmap.open(next(paths)).close()

    again = [
        Task(name=OPENING.format(n), run=partial(reopen, itertools.repeat(make(n, 1000))), calls=OPENINGS)
        for n in (32, 80)
    ]
    others = itertools.cycle([make(30, 1000 + number) for number in range(100)])
    return [*again, Task(name=OTHERS, run=partial(reopen, others), calls=OPENINGS)]


def memmap_tasks(folder: Path) -> list[Task]:
    """Other lazy formats: one file of f16, whose length is not validated."""

    def read(path: Path, shape: tuple[int, ...]) -> None:
        rows = np.memmap(path, np.float16, "r", shape=shape)
        rows[0, LAYERS - 1, 0].astype(np.float32)
        rows[1, LAYERS - 1, -1].astype(np.float32)

    def read_safetensors(path: Path) -> None:
        with safetensors.safe_open(path, "np") as file:
            rows = file.get_slice("rows")
            rows[0, LAYERS - 1, 0].astype(np.float32)
            rows[1, LAYERS - 1, -1].astype(np.float32)

    tasks = []
    for length in (SHORT, LONG):
        shape = (2, LAYERS, length, HEADS, DIM)
        size = int(np.prod(shape)) * 2
        path = folder / f"map{length}"
        path.touch()
        header = json.dumps({"rows": {"dtype": "F16", "shape": shape, "data_offsets": [0, size]}}).encode()
        lazy = folder / f"{length}.safetensors"
        lazy.write_bytes(len(header).to_bytes(8, "little") + header)
        for sparse, more in ((path, 0), (lazy, 8 + len(header))):
            with sparse.open("r+b") as file:
                file.truncate(size + more)
        tasks += [
            Task(name=f"np.memmap f16 at {length:,}", run=partial(read, path, shape)),
            Task(name=f"safetensors safe_open f16 at {length:,}", run=partial(read_safetensors, lazy)),
        ]
    return tasks


def loader_tasks(folder: Path) -> list[Task]:
    """Loaders that read everything: for the short cache only, since the long one takes 17 GB of memory."""
    rows = gaussian(2, LAYERS, SHORT, HEADS, DIM).astype(np.float16)
    safetensors.numpy.save_file({"rows": rows}, folder / "st")
    torch.save({"rows": torch.from_numpy(rows)}, folder / "pt")

    def task(name: str, load: Callable[[], object]) -> Task:
        return Task(name=f"{name} f16 at {SHORT:,}", run=load)

    return [
        task("safetensors load_file", lambda: safetensors.numpy.load_file(folder / "st")["rows"][0, 0, 0]),
        task("torch.load", lambda: load_torch(folder / "pt")["rows"][0, 0, 0]),
        task("torch.load, mmap=True", lambda: load_torch(folder / "pt", mmap=True)["rows"][0, 0, 0]),
    ]


if __name__ == "__main__":
    main()
