"""Attention over tensors that also gives the logarithm of the softmax's denominator.

What "kvmmap" falls back on for models with soft caps or sinks: torch's scaled_dot_product_attention knows neither. Pure
torch; knows nothing of caches.
"""

from __future__ import annotations

import torch

_BLOCK = 128  # queries whose scores exist at a time


def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in f32.

    Args:
        query: [batch, num_q_heads, n, head_dim].
        key: [batch, num_kv_heads, m, head_dim]; num_q_heads is a multiple of num_kv_heads.
        value: [batch, num_kv_heads, m, value_head_dim].
        scale: factor of the scores.
        softcap: bound c of the scores: c * tanh(score / c).
        window: how many keys up to its own a query sees; all by default. Without a mask attention is causal, and the
            last query stands where the last key does.
        mask: [batch or 1, num_q_heads or 1, n, m]: bool, True where a query sees a key; or numbers to add to the
            scores, after the soft cap. With a mask, window is ignored.
        bias: [batch or 1, num_q_heads or 1, n, m], to add to the scores besides.

    Returns:
        f32 [batch, num_q_heads, n, value_head_dim] and f32 [batch, num_q_heads, n]: zeros and -inf where nothing is
        seen.
    """
    batch, heads, count, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    out = torch.empty(batch, heads, count, value.shape[-1], device=query.device)
    lse = torch.empty(batch, heads, count, device=query.device)
    # [batch, num_kv_heads, group, n, head_dim]: the query heads of a KV head side by side.
    groups = heads // kv_heads
    grouped = (query.float() * scale).reshape(batch, kv_heads, groups, count, -1)
    key, value = key.float()[:, :, None], value.float()[:, :, None]
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        if mask is None:
            low, high = _visible(start, stop, length - count, window)
            seen = _causal(start, stop, low, high, length - count, window, query.device)
        else:
            low, high = 0, length
            seen = _by_kv_head(mask[:, :, start:stop], kv_heads)
        scores = grouped[:, :, :, start:stop] @ key[:, :, :, low:high].transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + _by_kv_head(bias[:, :, start:stop, low:high], kv_heads)
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype is torch.bool else scores + seen
        total = scores.logsumexp(-1)
        weights = torch.exp(scores - total.nan_to_num(neginf=0.0)[..., None])
        out[:, :, start:stop] = (weights @ value[:, :, :, low:high]).flatten(1, 2)
        lse[:, :, start:stop] = total.flatten(1, 2)
    return out, lse


def _by_kv_head(mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[batch or 1, num_q_heads or 1, n, m] -> [batch or 1, num_kv_heads or 1, group or 1, n, m]."""
    groups = mask.shape[1] // kv_heads if mask.shape[1] > 1 else 1
    return mask.reshape(mask.shape[0], -1, groups, *mask.shape[2:])


def _visible(start: int, stop: int, offset: int, window: int | None) -> tuple[int, int]:
    """The keys that any of a block of queries sees."""
    low = 0 if window is None else max(0, start + offset - window + 1)
    return low, stop + offset


def _causal(
    start: int, stop: int, low: int, high: int, offset: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Which of them each sees, bool [stop - start, high - low]."""
    positions = torch.arange(start + offset, stop + offset, device=device)[:, None]
    keys = torch.arange(low, high, device=device)[None]
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)
