"""What `kvmmap bench` measures: tasks that take turns with memcpy, until the time is up."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import kvmmap

from .progress import progress

MOST_ROUNDS = 101
BATCH = 64
"""Positions that are appended one by one in a round."""


@dataclass(slots=True)
class Figure:
    """One task, and how long it took in each round."""

    name: str
    run: Callable[[], object]
    bytes: int
    """f32 bytes that a round works on: what memcpy is given too. 0 where there is nothing to compare."""

    count: int = 1
    """Things that a round does: positions, openings."""

    unit: str = ""
    seconds: list[float] = field(default_factory=list)
    memcpy: list[float] = field(default_factory=list)
    """How long memcpy took for as many bytes, in the same rounds."""

    @property
    def ratio(self) -> float | None:
        """Median over the rounds of memcpy's time to the task's: 2.0 is twice as fast as memcpy."""
        return statistics.median(self._ratios()) if self.bytes else None

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and highest such ratio."""
        ratios = self._ratios()
        return min(ratios), max(ratios)

    def _ratios(self) -> list[float]:
        return [copy / own for copy, own in zip(self.memcpy, self.seconds, strict=True)]

    @property
    def speed(self) -> str:
        """The median speed, for a person."""
        each = statistics.median(self.seconds)
        if self.unit:
            return f"{each / self.count * 1e6:,.1f} us a {self.unit}"
        return f"{self.bytes / each / 1e9:.1f} GB/s of f32"

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON types."""
        names = ("name", "bytes", "count", "unit", "seconds", "memcpy", "ratio")
        return {name: getattr(self, name) for name in names}


def measure(
    folder: str, seconds: float, tokens: int, kv_heads: int, head_dim: int, *, no_progress: bool
) -> list[Figure]:
    """Run all tasks in turns for about so many seconds; the first round warms up, and does not count."""
    with ExitStack() as stack:
        copy, figures = _tasks(stack, folder, tokens, kv_heads, head_dim)
        advance = stack.enter_context(progress("measuring", no_progress, unit="s"))
        start = time.monotonic()
        for round in range(MOST_ROUNDS):
            for figure in figures:
                memcpy = _time(lambda: copy(figure.bytes)) if figure.bytes else 0.0  # noqa: B023
                own = _time(figure.run)
                if round:
                    figure.memcpy.append(memcpy)
                    figure.seconds.append(own)
            spent = time.monotonic() - start
            if advance:
                advance(min(int(spent), int(seconds)), int(seconds))
            # As much again as a round took would be too much.
            if round and spent * (round + 2) / (round + 1) > seconds:
                break
    return figures


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _tasks(
    stack: ExitStack, folder: str, tokens: int, kv_heads: int, head_dim: int
) -> tuple[Callable[[int], object], list[Figure]]:
    """Lay out arrays and files: every output is used again, so no memory is fresh when it counts."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, kv_heads, head_dim), dtype=np.float32)
    out, codes, scales = np.zeros_like(x), np.zeros(x.shape, np.int8), np.zeros(x.shape[:-1], np.float32)
    flat, flat_out = x.reshape(-1), out.reshape(-1)

    def copy(size: int) -> None:
        left = size // 4
        while left:
            part = min(left, len(flat))
            np.copyto(flat_out[:part], flat[:part])
            left -= part

    path = os.path.join(folder, "bench.kvm")
    cache = stack.enter_context(
        kvmmap.create(path, num_layers=1, capacity=tokens + BATCH, num_kv_heads=kv_heads, head_dim=head_dim)
    )
    cache.extend(x[None], x[None])
    layer = cache.layers[cache.geometry.row_layers[0]]

    def extend() -> None:
        cache.truncate(0)
        cache.extend(x[None], x[None])

    def push() -> None:
        cache.truncate(tokens)
        for position in range(BATCH):
            cache.push_step(x[None, position], x[None, position])

    def open_close() -> None:
        kvmmap.open(path).close()

    figures = [
        Figure("memcpy", lambda: np.copyto(out, x), x.nbytes),
        Figure("quantize rows", lambda: kvmmap.quantize_rows(x, codes=codes, scales=scales, threads=1), x.nbytes),
        Figure("dequantize rows", lambda: kvmmap.dequantize_rows(codes, scales, out=out, threads=1), x.nbytes),
        Figure("append a prompt to a file", extend, 2 * x.nbytes),
        Figure("read keys from a file", lambda: layer.read_keys(0, tokens, out=out, threads=1), x.nbytes),
        Figure("append a position", push, 0, BATCH, "position"),
        Figure("open a cache", open_close, 0, 1, "opening"),
    ]
    figures[3:3] = _attention(layer, x)
    return copy, figures


def _attention(layer: kvmmap.QuantizedKvLayer, x: np.ndarray) -> Iterator[Figure]:
    """Yield the decode step of 1 and 4 query heads a KV head, over all positions: it reads the keys and values once."""
    attend = getattr(layer, "attend", None)
    if attend is None:
        return
    for group in (1, 4):
        queries = np.repeat(x[:1], group, axis=1)
        name = f"attend, {group} query head{'s' if group > 1 else ''} per KV head"
        yield Figure(name, lambda queries=queries: attend(queries, threads=1), 2 * x.nbytes)  # type: ignore[misc]
