"""Attention in which each query has its own last positions in 16 bits: what attention in place is compared to.

As an implementation of transformers', "windowed", for models that hand keys and values on as the cache returned them,
and a `RoundedCache` whose tensors carry both forms of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from helpers.tiny_models import RoundedCache

WINDOWED = "windowed"


class WindowedCache(RoundedCache):
    """A `RoundedCache` for models that attend with `WINDOWED`."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        start = self.get_seq_length(layer_idx)
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for both in zip(found, self.forms, strict=True):
            both[0].windowed = (*both[1], start)
        return found


def attend(
    module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, scaling: float | None = None, **more: Any
) -> tuple[torch.Tensor, None]:
    """[1, heads, n, dim] -> [1, n, heads, value dim], by the definition: each query with its own form of each row."""
    coded_keys, exact_keys, window, sinks, start = key.windowed
    coded_values, exact_values = value.windowed[:2]
    group, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    length = key.shape[2]
    queries, positions = torch.arange(start, start + query.shape[2])[:, None], torch.arange(length)
    near = (positions > queries - window) | (positions < sinks)

    def scores(keys: torch.Tensor) -> torch.Tensor:
        return query @ keys.repeat_interleave(group, 1).transpose(2, 3) * scale

    both = torch.where(near, scores(exact_keys), scores(coded_keys)).masked_fill(positions > queries, -torch.inf)
    weights = both.softmax(-1)
    out = (weights * near) @ exact_values.repeat_interleave(group, 1)
    out += (weights * ~near) @ coded_values.repeat_interleave(group, 1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(WINDOWED, attend)
AttentionMaskInterface.register(WINDOWED, sdpa_mask)
