"""Recipes of other programs for keys and values, as a model's attention sees them, and kvmmap's own caches by name.

A causal model that reads n tokens at once sees, at every layer, the keys and values that one sees that reads token by
token through a cache, as long as what is stored of a row depends on that row alone. Reading with decode(encode(rows))
in place of rows is reading through a cache, exactly. kvmmap's caches, whose recent window makes rows depend on the
query, are not emulated: the model reads through them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvmmap.codecs import by_name
from kvmmap.codecs.presets import PRESETS, SINKS, preset_recent

Rows = torch.Tensor
"""[1, heads, n, dim], f32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to keep keys and values."""

    name: str

    keys: Callable[[Rows], Rows]
    """What comes back of keys."""

    values: Callable[[Rows], Rows]

    bits: Callable[[int], float]
    """Bits that a number takes, by head_dim; what has a fixed size, such as a window, not counted."""

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
        if sliding is None and count == total:
            return scaled_dot_product_attention(query, *coded, is_causal=True, scale=scale, enable_gqa=True)
        seen = causal(total - count, total, total, sliding)
        return scaled_dot_product_attention(query, *coded, seen, scale=scale, enable_gqa=True)


def causal(start: int, stop: int, total: int, sliding: int | None) -> torch.Tensor:
    """Which of `total` positions the queries of [start, stop) see: bool [stop - start, total]."""
    positions, keys = torch.arange(start, stop)[:, None], torch.arange(total)
    seen = keys <= positions
    return seen if sliding is None else seen & (keys > positions - sliding)


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
    _alike("llama.cpp's q8_0, emulated", q8_0, 8.5),
    _alike("llama.cpp's q4_0, emulated", q4_0, 4.5),
)
"""What other programs do to a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How a `KvmmapCache` keeps rows."""

    name: str

    keys: str
    """Codec of keys."""

    values: str
    """Codec of values."""

    window: int = 0
    """Last positions in 16 bits."""

    sinks: int = 0
    """First positions in 16 bits."""

    def bits(self, dim: int) -> float:
        """Bits that a number takes, by head_dim; what has a fixed size, such as a window, not counted."""
        return statistics.mean(by_name(part).bits_per_number(dim) for part in (self.keys, self.values))

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `KvmmapCache`."""
        return {
            "key_codec": self.keys,
            "value_codec": self.values,
            "recent_window": self.window,
            "sinks": self.sinks,
        }


def _of_preset(preset: str, window: int | None = None) -> Kept:
    own, sinks = preset_recent(preset)
    name = preset if window is None else f"{preset}, window of {window}" if window else f"{preset}, no window"
    window = own if window is None else window
    return Kept(
        name=name, keys=PRESETS[preset][0], values=PRESETS[preset][1], window=window, sinks=sinks if window else 0
    )


def _of_codec(name: str, window: int = 0) -> Kept:
    return Kept(
        name=f"{name}, window of {window}" if window else name,
        keys=name,
        values=name,
        window=window,
        sinks=SINKS if window else 0,
    )


CACHES: tuple[Kept, ...] = (
    *(_of_preset(name) for name in ("int8", "fidelity", "compact", "small", "tiny")),
    *(_of_codec(name) for name in ("bf16", "f16", "int8-rotated")),
    *(_of_preset(name, window) for window in (64, 128, 256, 0) for name in ("fidelity", "compact", "small", "tiny")),
    *(_of_codec(name) for name in ("int6-rotated", "int5-rotated", "int3-rotated")),
    *(_of_codec(name) for name in ("fp8-e4m3", "fp8-e4m3-scaled", "fp8-e5m2", "fp8-e5m2-scaled")),
    *(_of_codec(name, 256) for name in ("int6-rotated", "int3-rotated")),
)
"""kvmmap's presets and codecs; the ones that matter most first."""
