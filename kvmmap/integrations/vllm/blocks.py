"""Rows in vLLM's paged KV cache: where they lie is learnt, by writing numbers through the attention's own code.

Each attention backend has a layout of its own, which may depend on the processor and the dtype (vLLM's for CPUs keeps
keys transposed, or packed for AMX). Rows are written by the backend. To read them, numbers that name themselves are
written once into blocks that nothing uses yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...errors import UnsupportedModelError

BASE = 128
"""Numbers are written as digits below this: integers that every dtype of 16 bits holds."""

EMPTY = -1.0
"""What blocks hold where nothing was written."""


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """The keys and values of one layer of an engine, and where a position's numbers lie in a block."""

    name: str
    layer: Any
    """vLLM's attention layer."""
    cache: torch.Tensor
    """[blocks, ...]."""
    block_tokens: int
    """Positions of a block of `cache`; vLLM's scheduler may count in blocks that are multiples of these."""
    keys: torch.Tensor
    """Place of each number of a block's keys, i64 [block_tokens, heads, head_dim]."""
    values: torch.Tensor

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of positions, [n, heads, dim], on the CPU.

        Args:
            slots: where they lie, i64 [n]: block times positions of a block, plus the place in it.
        """
        blocks, places = slots // self.block_tokens, slots % self.block_tokens
        wanted, inverse = torch.unique_consecutive(blocks, return_inverse=True)
        flat = self.cache[wanted].reshape(len(wanted), -1)
        found = []
        for places_of in (self.keys, self.values):
            chosen = places_of[places]
            rows = flat[inverse[:, None, None], chosen]
            found.append(rows.cpu())
        return found[0], found[1]

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values of positions, [n, heads, dim], by the backend's own code."""
        device, dtype = self.cache.device, self.cache.dtype
        self.layer.impl.do_kv_cache_update(
            self.layer,
            keys.to(device, dtype).contiguous(),
            values.to(device, dtype).contiguous(),
            self.cache,
            slots,
        )


def learn(name: str, layer: Any, cache: torch.Tensor, shape: tuple[int, int, int], slots: int) -> PagedLayer:
    """Find out where a layer's rows lie. Two blocks are written and zeroed again, so nothing may be in them yet.

    Args:
        name: the layer's, for messages.
        layer: vLLM's attention layer.
        cache: its KV cache, with blocks as the first dimension.
        shape: KV heads, head_dim, head_dim of values.
        slots: positions that the whole of it holds.

    Raises:
        UnsupportedModelError: rows don't lie in it in a way that can be read back.
    """
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise _refusal(name, f"{type(layer.impl).__name__} does not write rows by itself")
    if len(cache) < 3 or slots % len(cache):
        raise _refusal(name, f"{slots} positions in {len(cache)} blocks")
    tokens = slots // len(cache)
    blank = torch.empty(0, dtype=torch.int64)
    writer = PagedLayer(name, layer, cache, tokens, blank, blank)
    first, last = 1, len(cache) - 1
    try:
        keys, values = _probe(writer, first, shape)
        found = PagedLayer(name, layer, cache, tokens, keys, values)
        _check(found, last, shape)
    finally:
        cache[first].zero_()
        cache[last].zero_()
    return found


def _probe(writer: PagedLayer, block: int, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dim, value_dim = shape
    cache, tokens = writer.cache, writer.block_tokens
    sizes = tokens * heads * dim, tokens * heads * value_dim
    numbers = torch.arange(sum(sizes))
    slots = block * tokens + torch.arange(tokens, device=cache.device)
    there = torch.zeros(cache[block].numel(), dtype=torch.int64)
    used = None
    unit = 1
    while unit < len(numbers):
        digits = (numbers // unit % BASE).float()
        cache[block].fill_(EMPTY)
        writer.write(
            slots,
            digits[: sizes[0]].reshape(tokens, heads, dim),
            digits[sizes[0] :].reshape(tokens, heads, value_dim),
        )
        seen = cache[block].reshape(-1).float().cpu()
        if used is None:
            used = seen != EMPTY
        if not torch.equal(used, seen != EMPTY):
            raise _refusal(writer.name, "it writes to other places at each call")
        there += torch.where(used, seen, 0).long() * unit
        unit *= BASE
    assert used is not None
    places = torch.nonzero(used).reshape(-1)
    if len(places) != len(numbers) or not torch.equal(torch.sort(there[places]).values, numbers):
        raise _refusal(writer.name, "a block does not contain each number of its rows exactly once")
    found = torch.empty_like(numbers)
    found[there[places]] = places
    return (
        found[: sizes[0]].reshape(tokens, heads, dim).to(cache.device),
        found[sizes[0] :].reshape(tokens, heads, value_dim).to(cache.device),
    )


def _check(found: PagedLayer, block: int, shape: tuple[int, int, int]) -> None:
    """Write other rows to another block, one position after the other, and read them back."""
    heads, dim, value_dim = shape
    cache, tokens = found.cache, found.block_tokens
    made = torch.Generator().manual_seed(1)
    keys = torch.randn(tokens, heads, dim, generator=made).to(cache.dtype)
    values = torch.randn(tokens, heads, value_dim, generator=made).to(cache.dtype)
    slots = block * tokens + torch.arange(tokens, device=cache.device)
    half = tokens // 2
    for part in (slice(half, tokens), slice(half)):
        found.write(slots[part], keys[part], values[part])
    read = found.read(slots)
    if not (torch.equal(read[0], keys) and torch.equal(read[1], values)):
        raise _refusal(found.name, "rows of another block are not read back as they were written")


def _refusal(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the layout of {name}'s KV cache is not understood: {why}")
