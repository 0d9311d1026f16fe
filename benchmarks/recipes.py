"""Ways to keep keys and values, as a model's attention sees them: kvmmap's codecs, and recipes of other programs.

A causal model that reads n tokens at once sees, at every layer, the keys and values that one sees that reads token by
token through a cache, as long as what is stored of a row depends on that row alone. Reading with decode(encode(rows))
in place of rows is reading through a cache, exactly. With a recent window, each query sees 16-bit rows for the newest
positions, its own among them, and for the sinks; decoded rows else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvmmap import codecs
from kvmmap.codecs.presets import RECENT_WINDOW, SINKS

Rows = torch.Tensor
"""[1, heads, n, dim], f32."""

BLOCK = 256
"""Queries that are attended for at a time where rows differ by query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to keep keys and values."""

    name: str

    keys: Callable[[Rows], Rows]
    """What comes back of keys."""

    values: Callable[[Rows], Rows]

    bits: Callable[[int], float]
    """Bits that a number takes, by head_dim; what has a fixed size, such as a window, not counted."""

    near: Callable[[Rows], Rows] | None = None
    """What comes back of rows in the window and of sinks; None: there is none."""

    window: int = RECENT_WINDOW
    """Recent positions that there are rows for in 16 bits."""

    def attend(
        self, query: torch.Tensor, key: Rows, value: Rows, scale: float | None, sliding: int | None
    ) -> torch.Tensor:
        """Attend causally, for the queries of the last positions.

        Args:
            query: [1, num_q_heads, count, dim].
            key, value: [1, num_kv_heads, n, dim], rows as the model makes them.
            sliding: positions that a query sees of the model's own accord; None: all before it.

        Returns:
            [1, num_q_heads, count, value dim].
        """
        coded = self.keys(key), self.values(value)
        count, total = query.shape[2], key.shape[2]
        if self.near is None:
            if sliding is None and count == total:
                return scaled_dot_product_attention(query, *coded, is_causal=True, scale=scale, enable_gqa=True)
            seen = causal(total - count, total, total, sliding)
            return scaled_dot_product_attention(query, *coded, seen, scale=scale, enable_gqa=True)
        exact = self.near(key), self.near(value)
        for far, close in zip(coded, exact, strict=True):
            far[:, :, :SINKS] = close[:, :, :SINKS]
        blocks = []
        for start in range(total - count, total, BLOCK):
            stop = min(total, start + BLOCK)
            first = max(SINKS, start - self.window + 1)
            seen, near = causal(start, stop, stop, sliding), causal(start, stop, stop, self.window)
            near[:, :SINKS] = False
            rows = [
                torch.cat([far[:, :, :stop], close[:, :, first:stop]], 2)
                for far, close in zip(coded, exact, strict=True)
            ]
            mask = torch.cat([seen & ~near, (seen & near)[:, first:]], 1)
            part = query[:, :, start - total + count : stop - total + count]
            blocks.append(scaled_dot_product_attention(part, *rows, mask, scale=scale, enable_gqa=True))
        return torch.cat(blocks, 2)


def causal(start: int, stop: int, total: int, sliding: int | None) -> torch.Tensor:
    """Which of `total` positions the queries of [start, stop) see: bool [stop - start, total]."""
    positions, keys = torch.arange(start, stop)[:, None], torch.arange(total)
    seen = keys <= positions
    return seen if sliding is None else seen & (keys > positions - sliding)


def through(name: str) -> Callable[[Rows], Rows]:
    """Encode rows by one of kvmmap's codecs, and decode them."""
    codec = codecs.by_name(name)

    def there_and_back(rows: Rows) -> Rows:
        numbers = np.ascontiguousarray(rows[0].transpose(0, 1).numpy())
        arrays = [np.empty((*numbers.shape[:2], *one.shape), one.dtype) for one in codec.arrays(numbers.shape[2])]
        bad = codec.encode(numbers, 0, arrays, 1)
        if bad != -1:
            raise ValueError(f"{name} refuses row {bad}: {codec.refused}")
        return torch.from_numpy(codec.decoded(arrays, numbers.shape[2])).transpose(0, 1)[None].contiguous()

    return there_and_back


def pair(name: str, keys: str, values: str, *, near: str | None = None, window: int = RECENT_WINDOW) -> Recipe:
    """Return the recipe of a pair of kvmmap's codecs, with a window and sinks stored by `near`."""
    return Recipe(
        name=name,
        keys=through(keys),
        values=through(values),
        bits=lambda dim: statistics.mean(codecs.by_name(part).bits_per_number(dim) for part in (keys, values)),
        near=None if near is None else through(near),
        window=window,
    )


def exact(rows: Rows) -> Rows:
    """Give rows back as they are: f32."""
    return rows


def q8_0(rows: Rows) -> Rows:
    """llama.cpp's q8_0: blocks of 32 numbers, absolute maximum over 127 as an f16 scale, rounding half away."""
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * torch.where(scale > 0, 1 / scale, torch.zeros(()))
    codes = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
    return (codes * scale.half().float()).reshape(rows.shape)


def q4_0(rows: Rows) -> Rows:
    """llama.cpp's q4_0: blocks of 32 numbers, the one of the largest magnitude over -8 as an f16 scale, 16 levels."""
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    scaled = blocks * torch.where(scale != 0, 1 / scale, torch.zeros(()))
    codes = torch.floor(scaled + 8.5).clamp(max=15) - 8
    return (codes * scale.half().float()).reshape(rows.shape)


def _alike(name: str, back: Callable[[Rows], Rows], bits: float) -> Recipe:
    return Recipe(name=name, keys=back, values=back, bits=lambda dim: bits)


F32 = _alike("f32", exact, 32)

RECIPES: tuple[Recipe, ...] = (
    pair("int8", "int8", "int8"),
    pair("int8-rotated", "int8-rotated", "int8-rotated"),
    pair("bf16", "bf16", "bf16"),
    pair("fidelity, window", "int8-rotated", "int8-rotated", near="f16"),
    pair("compact, window", "int8-rotated", "int4-rotated", near="f16"),
    pair("small, window", "int5-rotated", "int4-rotated", near="f16"),
    pair("tiny, window", "int4-rotated", "int4-rotated", near="f16"),
    pair("f16", "f16", "f16"),
    pair("compact", "int8-rotated", "int4-rotated"),
    pair("small", "int5-rotated", "int4-rotated"),
    pair("int4-rotated", "int4-rotated", "int4-rotated"),
    _alike("llama.cpp's q8_0, emulated", q8_0, 8.5),
    _alike("llama.cpp's q4_0, emulated", q4_0, 4.5),
    pair("compact, window of 256", "int8-rotated", "int4-rotated", near="f16", window=256),
    pair("small, window of 256", "int5-rotated", "int4-rotated", near="f16", window=256),
    pair("tiny, window of 256", "int4-rotated", "int4-rotated", near="f16", window=256),
    pair("fidelity, bf16 window", "int8-rotated", "int8-rotated", near="bf16"),
    pair("int5-rotated", "int5-rotated", "int5-rotated"),
    pair("int6-rotated", "int6-rotated", "int6-rotated"),
    pair("int6-rotated, window", "int6-rotated", "int6-rotated", near="f16"),
    pair("int3-rotated, window", "int3-rotated", "int3-rotated", near="f16"),
    pair("fp8-e4m3", "fp8-e4m3", "fp8-e4m3"),
    pair("fp8-e4m3-scaled", "fp8-e4m3-scaled", "fp8-e4m3-scaled"),
    pair("fp8-e5m2", "fp8-e5m2", "fp8-e5m2"),
    pair("fp8-e5m2-scaled", "fp8-e5m2-scaled", "fp8-e5m2-scaled"),
    pair("int3-rotated", "int3-rotated", "int3-rotated"),
)
"""All but those that are run as they are; the ones that matter most first."""
