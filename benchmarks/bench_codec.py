"""The row codecs next to memcpy and to reading alone.

    python benchmarks/bench_codec.py [--mib 256] [--rounds 15] [--dim 128] [--json FILE]

"GB/s of f32" counts every number as the 4 bytes that it is in f32, whatever it is stored as. All outputs are reused and
touched beforehand, memcpy's as well; the arrays are far larger than the second-level cache, but for "scratch", whose
output stays in it. A target is the median of the rounds' ratios to memcpy, one thread each, in the same process.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import ml_dtypes
import numpy as np
from harness import Bar, Measured, Report, Task, arguments, gaussian, measure

from kvmmap import codecs, dequantize_rows, quantize_rows

BF16 = ml_dtypes.bfloat16
SCRATCH_ROWS = 1024
MEMCPY, READ = "memcpy f32", "read f32"


def main() -> None:
    parser = arguments("Benchmark the row codec.", rounds=15)
    parser.add_argument("--mib", type=int, default=256, help="f32 MiB of input")
    parser.add_argument("--dim", type=int, default=128, help="head_dim")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="*", help="default: 1, and 2 where there are as many")
    args = parser.parse_args()
    threads = args.threads or ([1, 2] if len(os.sched_getaffinity(0)) > 1 else [1])

    report = Report("codec")
    positions = args.mib * 2**20 // (4 * args.heads * args.dim)
    report.note("rows", f"[{positions}, {args.heads}, {args.dim}], {args.mib} MiB of f32")
    make = Tasks(positions, args.heads, args.dim)
    for count in threads:
        measured = measure(make.tasks(count), args.rounds)
        title = f"row codec, {count} thread{'s' if count > 1 else ''} (memcpy and read: always one)"
        report.show(title, measured, [MEMCPY, READ])
        if count == 1:
            report.bars += bars(measured)
    report.finish(args.json)


def bars(measured: Measured) -> list[Bar]:
    """The targets of one thread."""
    rotated = [codec.name for codec in codecs.COMPILED if codec.transform]
    wanted = (
        ("quantize f32", 1.5),
        ("quantize bf16", 1.5),
        ("dequantize f32", 1.0),
        *((f"{name} encode f32", 0.8) for name in rotated),
    )
    return [
        Bar(
            f"{name} against memcpy f32, one thread",
            required,
            measured.ratio(name, MEMCPY).median,
            "x",
            beside="numpy.copyto",
        )
        for name, required in wanted
    ]


class Tasks:
    """The arrays and the tasks; every output is written once before, so that no page is fresh while it is timed."""

    def __init__(self, positions: int, heads: int, dim: int) -> None:
        self.f32 = gaussian(positions, heads, dim)
        self.f16, self.bf16 = self.f32.astype(np.float16), self.f32.astype(BF16)
        self.out32, self.out16 = np.zeros_like(self.f32), np.zeros_like(self.f16)
        self.out_bf16 = np.zeros_like(self.bf16)
        self.codes, self.scales = quantize_rows(self.f32)
        self.some_codes, self.some_scales = self.codes[:SCRATCH_ROWS].copy(), self.scales[:SCRATCH_ROWS].copy()

    def tasks(self, threads: int) -> list[Task]:
        """Return the tasks to time."""
        # numpy has no vectorised read that is as fast as the integer maximum of the bits.
        bits = self.f32.reshape(-1).view(np.int32)

        def task(name: str, run: Callable[[], object]) -> Task:
            return Task(name=name, run=run, f32_bytes=self.f32.nbytes)

        def quantize(x: np.ndarray) -> Callable[[], object]:
            return lambda: quantize_rows(x, codes=self.codes, scales=self.scales, threads=threads)

        def dequantize(out: np.ndarray) -> Callable[[], object]:
            return lambda: dequantize_rows(self.codes, self.scales, out.dtype, out, threads=threads)

        return [
            task(MEMCPY, lambda: np.copyto(self.out32, self.f32)),
            task(READ, bits.max),
            task("quantize f32", quantize(self.f32)),
            task("quantize f32, scratch", lambda: self.quantize_to_scratch(threads)),
            task("quantize f16", quantize(self.f16)),
            task("quantize bf16", quantize(self.bf16)),
            task("dequantize f32", dequantize(self.out32)),
            task("dequantize f16", dequantize(self.out16)),
            task("dequantize bf16", dequantize(self.out_bf16)),
            *(one for codec in codecs.COMPILED if codec is not codecs.INT8 for one in self.of_codec(codec, threads)),
        ]

    def of_codec(self, codec: codecs.RowCodec, threads: int) -> list[Task]:
        """Encode f32 and decode to it."""
        shape, dim = self.f32.shape[:2], self.f32.shape[2]
        arrays = [np.zeros((*shape, *one.shape), one.dtype) for one in codec.arrays(dim)]
        codec.encode(self.f32, 0, arrays, threads)  # what is decoded
        return [
            Task(
                name=f"{codec.name} encode f32",
                run=lambda: codec.encode(self.f32, 0, arrays, threads),
                f32_bytes=self.f32.nbytes,
            ),
            Task(
                name=f"{codec.name} decode f32",
                run=lambda: codec.decode(arrays, dim, self.out32, 0, threads),
                f32_bytes=self.f32.nbytes,
            ),
        ]

    def quantize_to_scratch(self, threads: int) -> None:
        """Quantise it all into the same few rows, as an append does."""
        for start in range(0, len(self.f32), SCRATCH_ROWS):
            x = self.f32[start : start + SCRATCH_ROWS]
            quantize_rows(x, codes=self.some_codes[: len(x)], scales=self.some_scales[: len(x)], threads=threads)


if __name__ == "__main__":
    main()
