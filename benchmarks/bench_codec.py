"""How fast the row codec is, next to memcpy and to reading alone, in one process and in interleaved rounds.

    python benchmarks/bench_codec.py [--mib 256] [--rounds 15] [--dim 128] [--json FILE]

"GB/s f32" counts every number as the 4 bytes that it is in f32, whatever it is stored as; "GB/s real" counts the bytes
that are read and written. Ratios are medians of the rounds' own ratios to the memcpy of the same f32 numbers and to
the read of them: on a shared machine, only figures of one round are comparable. All outputs are reused and touched
beforehand; the arrays are far larger than the last-level cache, but for "scratch", whose output stays in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from kvmmap import _core
from kvmmap.quantize import dequantize_rows, quantize_rows

BF16 = ml_dtypes.bfloat16
SCRATCH_ROWS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the row codec.")
    parser.add_argument("--mib", type=int, default=256, help="f32 MiB of input")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dim", type=int, default=128, help="head_dim")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument(
        "--threads", type=int, nargs="*", default=None, help="default: 1, and 2 where there are as many"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    threads = args.threads or ([1, 2] if len(os.sched_getaffinity(0)) > 1 else [1])

    positions = args.mib * 2**20 // (4 * args.heads * args.dim)
    f32_bytes = positions * args.heads * args.dim * 4
    report = {
        "kernel": _core.current_kernel(),
        "shape": [positions, args.heads, args.dim],
        "f32_bytes": f32_bytes,
        "rounds": args.rounds,
        "results": [],
    }
    print(f"kernel {report['kernel']}, {report['shape']}, {f32_bytes >> 20} MiB of f32, {args.rounds} rounds")
    tasks = make_tasks(positions, args.heads, args.dim)
    for count in threads:
        results = summarize(measure(tasks, args.rounds, count), tasks, f32_bytes)
        show(results, count)
        report["results"] += [{"threads": count, **result} for result in results]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


# name -> (run(threads), real bytes a number, read and written)
Tasks = dict[str, tuple[Callable[[int], object], float]]


def make_tasks(positions: int, heads: int, dim: int) -> Tasks:
    """Lay out the arrays; every output is written once, so that no page is fresh when it counts."""
    rng = np.random.default_rng(0)
    shape = (positions, heads, dim)
    f32 = np.empty(shape, np.float32)
    for part in np.array_split(f32, 16):
        part[:] = rng.standard_normal(part.shape, np.float32)
    f16, bf16 = f32.astype(np.float16), f32.astype(BF16)
    copy, out16, out_bf16 = np.zeros_like(f32), np.zeros_like(f16), np.zeros_like(bf16)
    codes, scales = quantize_rows(f32)
    some_codes, some_scales = codes[:SCRATCH_ROWS].copy(), scales[:SCRATCH_ROWS].copy()

    def quantize(x: np.ndarray) -> Callable[[int], object]:
        return lambda threads: quantize_rows(x, codes=codes, scales=scales, threads=threads)

    def quantize_to_scratch(threads: int) -> None:
        for start in range(0, positions, SCRATCH_ROWS):
            n = min(SCRATCH_ROWS, positions - start)
            x = f32[start : start + n]
            quantize_rows(x, codes=some_codes[:n], scales=some_scales[:n], threads=threads)

    def dequantize(out: np.ndarray) -> Callable[[int], object]:
        return lambda threads: dequantize_rows(codes, scales, out.dtype, out, threads=threads)

    # numpy has no vectorised read that is as fast as the integer maximum of the bits.
    bits = f32.reshape(-1).view(np.int32)
    return {
        "memcpy f32": (lambda threads: np.copyto(copy, f32), 8.0),
        "read f32": (lambda threads: bits.max(), 4.0),
        "quantize f32": (quantize(f32), 5.0),
        "quantize f32, scratch": (quantize_to_scratch, 5.0),
        "quantize f16": (quantize(f16), 3.0),
        "quantize bf16": (quantize(bf16), 3.0),
        "dequantize f32": (dequantize(copy), 5.0),
        "dequantize f16": (dequantize(out16), 3.0),
        "dequantize bf16": (dequantize(out_bf16), 3.0),
    }


def measure(tasks: Tasks, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of every task in every round; one round more, the first, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, (run, _) in tasks.items():
            start = time.perf_counter()
            run(threads)
            elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
    return seconds


def summarize(seconds: dict[str, list[float]], tasks: Tasks, f32_bytes: int) -> list[dict]:
    copies, reads = seconds["memcpy f32"], seconds["read f32"]
    results = []
    for name, times in seconds.items():
        speeds = [f32_bytes / t / 1e9 for t in times]
        to_memcpy = [c / t for c, t in zip(copies, times, strict=True)]
        to_read = [r / t for r, t in zip(reads, times, strict=True)]
        results.append(
            {
                "name": name,
                "gb_s_f32": spread(speeds),
                "gb_s_real": statistics.median(speeds) * tasks[name][1] / 4,
                "to_memcpy": spread(to_memcpy),
                "to_read": spread(to_read),
            }
        )
    return results


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(results: list[dict], threads: int) -> None:
    print(f"\n{threads} thread{'s' if threads > 1 else ''} (memcpy and read: always one)")
    print(f"{'':22} {'GB/s f32':>8} {'range':>12} {'real':>6}   {'x memcpy':>8} {'range':>11}   {'x read':>6}")
    for r in results:
        speed, ratio = r["gb_s_f32"], r["to_memcpy"]
        print(
            f"{r['name']:22} {speed['median']:8.1f} {speed['min']:5.1f}-{speed['max']:<6.1f} {r['gb_s_real']:6.1f}   "
            f"{ratio['median']:8.2f} {ratio['min']:5.2f}-{ratio['max']:<5.2f}   {r['to_read']['median']:6.2f}"
        )


if __name__ == "__main__":
    main()
