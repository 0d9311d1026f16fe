"""One pass over a cache that is only on the disk: speed relative to `pread` and `dd`, and memory use.

    python benchmarks/bench_streaming.py [--gb 4] [--rounds 2] [--folder .] [--json FILE]

Makes a cache file of so many gigabytes, and for each of its layers in turn empties the page cache of the file (checked
with mincore) and reads the layer's bytes in one of these ways:

    pread      each of the four slabs from start to end, 1 MiB at a time: the baseline
    dd         the same bytes by dd, bs=1M, in a process of its own
    map        through the map as it comes: every page of the slabs is touched
    stream     the same, part by part, like attend(resident="stream")
    prefetch   layer.prefetch() of the whole layer, and then "map"
    attend     layer.attend(queries, resident="stream"), 4 query heads a KV head
    keep       layer.attend(queries), which leaves the layer in memory

Ratios are medians over layers and rounds of the speed relative to `pread` in the same turn, since the disks of rented
machines change their speed by the second. "memory" is the peak growth of resident memory within a call (VmHWM), the
maximum over all turns. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bar, machine

import kvmmap
from kvmmap.format import SLAB_SECTIONS

HEADS, DIM, POSITIONS = 8, 128, 1 << 18
GROUP = 4
OF_PREAD = 0.8
LIBC = ctypes.CDLL(None, use_errno=True)

Extents = list[tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark reading caches that are on the disk alone.")
    parser.add_argument("--gb", type=float, default=4, help="size of the cache")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the cache goes for the time being")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    layer_bytes = HEADS * (2 * DIM + 8) * POSITIONS
    layers = max(1, round(args.gb * 1e9 / layer_bytes))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "streaming.kvm"
        build(path, layers)
        print(f"{layers} layers of {layer_bytes / 1e6:.0f} MB, {args.rounds} rounds, {os.cpu_count()} processors")
        results = measure(path, layers, args.rounds)
    report = [summarize(name, turns) for name, turns in results.items()]
    print(f"{'':10} {'GB/s':>6} {'range':>10}   {'x pread':>7} {'range':>10}   {'memory':>8}")
    for r in report:
        speed, ratio = r["gb_s"], r["to_pread"]
        print(
            f"{r['name']:10} {speed['median']:6.2f} {speed['min']:4.2f}-{speed['max']:<5.2f}   "
            f"{ratio['median']:7.2f} {ratio['min']:4.2f}-{ratio['max']:<5.2f}   {r['memory_mb']:5.0f} MB"
        )
    if args.json:
        ratio = next(row for row in report if row["name"] == "attend")["to_pread"]["median"]
        bar = Bar("attention over a cold file, of reading it", OF_PREAD, ratio, "x", beside="pread, 1 MiB at a time")
        found = {"name": "streaming", "machine": machine(), "rows": report, "bars": [asdict(bar) | {"met": bar.met}]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def build(path: Path, layers: int) -> None:
    """Fill a cache with the same few thousand rows, repeated."""
    some = 4096
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (some, HEADS, DIM), np.int8)
    scales = rng.uniform(0.01, 0.02, (some, HEADS)).astype(np.float32)
    with kvmmap.create(path, num_layers=layers, capacity=POSITIONS, num_kv_heads=HEADS, head_dim=DIM) as cache:
        for layer in cache.layers:
            for _ in range(POSITIONS // some):
                layer.extend_quantized(codes, scales, codes, scales)


def measure(path: Path, layers: int, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Return (bytes a second, ratio to pread, growth of memory in bytes) of every turn."""
    queries = np.random.default_rng(1).standard_normal((1, HEADS * GROUP, DIM), np.float32)
    results: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(rounds * layers):
        number = turn % layers
        with kvmmap.open(path) as cache:
            layer = cache.layers[number]
            extents = extents_of(cache, number)
            total = sum(size for _, size in extents)
            ways: dict[str, Callable[[], Any]] = {
                "pread": lambda extents=extents: pread(path, extents),
                "dd": lambda extents=extents: dd(path, extents),
                "map": lambda layer=layer: touch(layer.read_quantized()),
                "stream": lambda layer=layer: [touch(rows) for rows in layer._store.scan(0, len(layer))],
                "prefetch": lambda layer=layer: (layer.prefetch(), touch(layer.read_quantized())),
                "attend": lambda layer=layer: layer.attend(queries, resident="stream"),
                "keep": lambda layer=layer: layer.attend(queries),
            }
            # Each turn begins with another way: a disk that is slow for a while is so for all of them.
            names = list(ways)
            first = turn % len(names)
            seconds, grown = {}, {}
            for name in names[first:] + names[:first]:
                layer.release()
                make_cold(path)
                before = reset_peak()
                start = time.perf_counter()
                ways[name]()
                seconds[name] = time.perf_counter() - start
                grown[name] = status("VmHWM") - before
        for name in names:
            result = total / seconds[name], seconds["pread"] / seconds[name], grown[name]
            results.setdefault(name, []).append(result)
    return results


def pread(path: Path, extents: Extents) -> None:
    buffer = memoryview(bytearray(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    for offset, size in extents:
        end = offset + size
        while offset < end:
            offset += os.preadv(fd, [buffer[: min(len(buffer), end - offset)]], offset)
    os.close(fd)


def dd(path: Path, extents: Extents) -> None:
    for offset, size in extents:
        ranges = ["iflag=skip_bytes,count_bytes", f"skip={offset}", f"count={size}"]
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", *ranges], check=True, capture_output=True)


def touch(rows: Any) -> None:
    """Read all codes, in one thread and as fast as memory gives them, and one scale a page."""
    rows.key_codes.reshape(-1).view(np.int64).max()
    rows.value_codes.reshape(-1).view(np.int64).max()
    rows.key_scales.reshape(-1)[::1024].max()
    rows.value_scales.reshape(-1)[::1024].max()


def extents_of(cache: kvmmap.QuantizedKvCache, layer: int) -> Extents:
    sections = cache._storage.superblock.sections
    return [tuple(sections[kind, layer]) for kind in SLAB_SECTIONS]


def make_cold(path: Path) -> None:
    """Evict the file from the page cache, and check that it is."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    size = os.fstat(fd).st_size
    memory = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    os.close(fd)
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    view = np.frombuffer(memory, np.uint8)
    LIBC.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages.ctypes.data_as(ctypes.c_void_p))
    warm = int((pages & 1).sum())
    del view
    memory.close()
    if warm > len(pages) / 100:
        raise SystemExit(f"{warm} of {len(pages)} pages stay in memory: no cold file can be had here")


def reset_peak() -> int:
    """Reset the peak of resident memory; return the current one, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status")


def summarize(name: str, turns: list[tuple[float, float, float]]) -> dict[str, Any]:
    speeds, ratios, grown = zip(*turns, strict=True)
    return {
        "name": name,
        "gb_s": spread([speed / 1e9 for speed in speeds]),
        "to_pread": spread(list(ratios)),
        "memory_mb": max(grown) / 1e6,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
