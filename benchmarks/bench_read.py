"""Read a layer's keys and values as tensors from a file in the page cache.

    python benchmarks/bench_read.py [--positions 16384] [--rounds 9] [--json FILE]

All but the loaders of other formats, which make new tensors each time, write into memory that is reused. memcpy copies
the f32 numbers that come out. Every file is in the page cache, and was opened before, but for the loaders, which open
it each time.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
from baselines import load_torch, new_memmap, save_safetensors, save_torch
from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

HEADS, DIM = 8, 128
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MEMCPY, MEMMAP = "memcpy f32", "np.memmap f16"


def main() -> None:
    parser = arguments("Benchmark reading a whole layer back.", rounds=9)
    parser.add_argument("--positions", type=int, default=16384)
    args = parser.parse_args()
    report = Report("read")
    shape = (args.positions, HEADS, DIM)
    rows = [gaussian(*shape, seed=seed) for seed in (0, 1)]
    with workspace(args.dir) as folder:
        maps = [new_memmap(folder / name, shape) for name in ("keys", "values")]
        for out, x in zip(maps, rows, strict=True):
            out[:] = x
        save_safetensors(folder / "st", *rows)
        save_torch(folder / "pt", *map(torch.from_numpy, rows))
        path = folder / "cache.kvm"
        with kvmmap.create(path, num_layers=1, capacity=shape[0], num_kv_heads=HEADS, head_dim=DIM) as cache:
            cache.layers[0].extend(*rows)
        with kvmmap.open(path) as cache:
            layer = cache.layers[0]
            outs = {name: [np.zeros(shape, dtype) for _ in rows] for name, dtype in DTYPES.items()}

            def task(name: str, run: Callable[[], object]) -> Task:
                return Task(name=name, run=run, f32_bytes=sum(x.nbytes for x in rows))

            def read(name: str, threads: int) -> Task:
                def run() -> None:
                    keys, values = outs[name]
                    layer.read_keys(dtype=name, out=keys, threads=threads)
                    layer.read_values(dtype=name, out=values, threads=threads)

                return task(f"kvmmap to {name}, {threads} thread{'s' if threads > 1 else ''}", run)

            def copy_to_f32(sources: list[np.ndarray]) -> None:
                for out, source in zip(outs["float32"], sources, strict=True):
                    np.copyto(out, source)

            def load_safetensors() -> None:
                tensors = safetensors.numpy.load_file(folder / "st")
                copy_to_f32([tensors["keys"], tensors["values"]])

            tasks = [
                task(MEMCPY, lambda: copy_to_f32(rows)),
                *(read(name, 1) for name in DTYPES),
                read("float32", 2),
                task(MEMMAP + ", to float32", lambda: copy_to_f32(maps)),
                task("safetensors load_file f16, to float32", load_safetensors),
                task("torch.load f16, to float32", lambda: [t.float() for t in load_torch(folder / "pt").values()]),
            ]
            measured = measure(tasks, args.rounds)
    title = f"read {list(shape)} keys and values, {2 * rows[0].nbytes >> 20} MiB as f32"
    report.show(title, measured, [MEMCPY, MEMMAP + ", to float32"])
    ratio = measured.ratio("kvmmap to float32, 1 thread", MEMCPY).median
    report.bars.append(
        Bar("read a layer as f32 against memcpy f32, one thread", 1.0, ratio, "x", beside="numpy.copyto")
    )
    report.finish(args.json)


if __name__ == "__main__":
    main()
