"""Append a prompt's keys and values to a new file: one layer, [n, num_kv_heads, head_dim], f32 and bf16; not synced.

    python benchmarks/bench_append.py [--positions 16384] [--rounds 9] [--json FILE]

Creating the empty file is not timed in any case; converting and writing is. memcpy copies the input into memory that is
already in use. Every run writes a new file, whose pages are fresh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from baselines import new_memmap, save_safetensors, save_torch
from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

HEADS, DIM = 8, 128
MEMCPY, MEMMAP = "memcpy", "np.memmap f16"


def main() -> None:
    parser = arguments("Benchmark appending a prompt to a fresh file.", rounds=9)
    parser.add_argument("--positions", type=int, default=16384)
    args = parser.parse_args()
    report = Report("append")
    shape = (args.positions, HEADS, DIM)
    for name, dtype in (("f32", np.dtype(np.float32)), ("bf16", np.dtype(ml_dtypes.bfloat16))):
        keys, values = (gaussian(*shape, seed=seed).astype(dtype) for seed in (0, 1))
        with workspace(args.dir) as folder:
            append = Append(folder, keys, values)
            measured = measure(append.tasks(), args.rounds)
            append.close()
        title = f"append {list(shape)} keys and values of {name}, {2 * keys.nbytes >> 20} MiB, to a fresh file"
        report.show(title, measured, [MEMCPY, MEMMAP])
        for baseline, required in ((MEMCPY, 0.35), (MEMMAP, 1.0)):
            what = f"append {name} to a fresh file against {baseline}"
            report.bars.append(Bar(what, required, measured.ratio("kvmmap", baseline).median, "x", beside=baseline))
    report.finish(args.json)


class Append:
    """One input, and the ways to append it to a file."""

    def __init__(self, folder: Path, keys: np.ndarray, values: np.ndarray) -> None:
        self.folder, self.keys, self.values = folder, keys, values
        self.copies = np.zeros_like(keys), np.zeros_like(values)
        self.tensors = [torch.from_dlpack(rows) if rows.dtype == np.float32 else bf16(rows) for rows in (keys, values)]
        self.cache: kvmmap.QuantizedKvCache | None = None
        self.maps: list[np.memmap] = []

    def tasks(self) -> list[Task]:
        """Return the tasks to time."""

        def task(name: str, run: Callable[[], object], before: Callable[[], object] = self.close) -> Task:
            return Task(name=name, run=run, before=before, f32_bytes=2 * self.keys.size * 4)

        tasks = [
            task(MEMCPY, self.copy),
            task("kvmmap", self.extend, self.new_cache),
            task(MEMMAP, self.store, lambda: self.new_maps(np.dtype(np.float16))),
        ]
        if self.keys.dtype != np.float32:
            tasks.append(task("np.memmap, as it is", self.store, lambda: self.new_maps(self.keys.dtype)))
        return [
            *tasks,
            task("safetensors save_file f16", lambda: save_safetensors(self.folder / "st", self.keys, self.values)),
            task("torch.save f16", lambda: save_torch(self.folder / "pt", *self.tensors)),
        ]

    def copy(self) -> None:
        for out, rows in zip(self.copies, (self.keys, self.values), strict=True):
            np.copyto(out, rows)

    def new_cache(self) -> None:
        self.close()
        n, heads, dim = self.keys.shape
        self.cache = kvmmap.create(
            self.folder / "cache.kvm", num_layers=1, capacity=n, num_kv_heads=heads, head_dim=dim
        )

    def extend(self) -> None:
        assert self.cache is not None
        self.cache.layers[0].extend(self.keys, self.values)

    def new_maps(self, dtype: np.dtype) -> None:
        self.close()
        self.maps = [new_memmap(self.folder / name, self.keys.shape, dtype) for name in ("keys", "values")]

    def store(self) -> None:
        for out, rows in zip(self.maps, (self.keys, self.values), strict=True):
            out[:] = rows

    def close(self) -> None:
        """Remove the files of the last run, so that they are not written back while others are timed."""
        self.maps.clear()
        for path in list(self.folder.iterdir()):
            path.unlink()
        if self.cache is not None:
            with contextlib.suppress(kvmmap.CacheChangedError):  # says that closing a removed file saves nothing
                self.cache.close()
            self.cache = None


def bf16(rows: np.ndarray) -> torch.Tensor:
    """The same numbers as a tensor, without a copy."""
    return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)


if __name__ == "__main__":
    main()
