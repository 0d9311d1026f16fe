"""Masks of selected keys: models with index keys attend only to those that they select for each query.

Such models make these masks themselves for the implementations "eager" and "sdpa", and hand the selection on to others.
Knows tensors; nothing of caches.
"""

from __future__ import annotations

from typing import Any

import torch


def selected_keys(
    indices: torch.Tensor, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Return a mask that hides all keys but selected ones.

    Args:
        indices: int [batch, n, k], the selected keys.
        mask: what is seen besides, as attention functions get it.
        query: [batch, num_q_heads, n, head_dim].
        key: [batch, num_kv_heads, m, head_dim].

    Returns:
        [batch, heads or 1, n, m]: bool if the mask is, or there is none; else numbers to add to scores.
    """
    batch, _, count, _ = query.shape
    seen = torch.zeros(batch, count, key.shape[2], dtype=torch.bool, device=query.device)
    seen = seen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        positions = torch.arange(key.shape[2], device=query.device)
        return seen & (positions <= positions[-count:, None])
    return seen & mask if mask.dtype is torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def selected_blocks(
    module: Any,
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return a mask that hides all blocks of keys but selected ones, as MiniMax M3 itself makes it.

    Args:
        module: its attention module.
        indices: the selected blocks, as its indexer returns them.
        mask, query, key: as for `selected_keys`.
        position_ids: of the queries; by default they are the last ones.
    """
    length, count = key.shape[2], query.shape[2]
    if position_ids is None:
        position_ids = torch.arange(length - count, length, device=query.device)[None]
    made: torch.Tensor = module.indexer.build_block_mask(
        indices, mask, length, query.dtype, query.device, position_ids.expand(query.shape[0], -1)
    )
    return made
