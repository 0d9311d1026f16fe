"""What the arguments of a forward pass say of it: which tokens are fed, and whether attention is plainly causal.

Keys and values belong to their token ids only if each token has the position that it is stored at and attends to all
tokens before it (within the layer's window), and if nothing but token ids went in. Passes that plainly don't are
refused; where a pass may be what the caller wants (masks of its own, embeddings), it is stored with unknown token ids.

Pure: knows no models, hooks or caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import UnsupportedModelError

# Tensors that don't change which keys and values belong to which token ids, or that are looked at by themselves.
_NEUTRAL = frozenset(
    {
        "attention_mask",
        "cache_position",
        "input_ids",
        "inputs_embeds",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "position_ids",
    }
)


def known_ids(given: Mapping[str, Any], length: int, placeholders: frozenset[int], seen: bool) -> NDArray[np.int32]:
    """Return the token ids of a forward pass that keys and values can be recorded under.

    Args:
        given: the arguments of the pass by name.
        length: positions stored before it.
        placeholders: token ids that stand for images and the like.
        seen: True if one of them is stored already.

    Returns:
        int32 [n], the ids from the first new position up to where they are unknown.
    """
    ids = given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or ids.is_floating_point():
        return np.empty(0, np.int32)
    found: NDArray[np.int32] = ids[0].to("cpu", torch.int32).numpy()
    marked = _first(np.isin(found, list(placeholders))) if placeholders else len(found)
    if seen or marked < len(found):
        end = len(found)  # whatever comes in besides the ids: reuse ends at the placeholder, and so before its effects
    else:
        end = 0 if any(_has_effect(*item, bool(placeholders)) for item in given.items()) else len(found)
    end = min(end, _first(found < 0))
    return found[:end]


def _has_effect(name: str, value: Any, multimodal: bool) -> bool:
    """Whether an argument may change keys and values besides token ids and positions."""
    if name in _NEUTRAL or value is None:
        return False
    if name.endswith("token_type_ids") and multimodal and isinstance(value, torch.Tensor):
        return bool(value.any())  # zeros: text
    if isinstance(value, list | tuple):
        return any(isinstance(item, str | torch.Tensor) for item in value)
    return isinstance(value, torch.Tensor)


def check_positions(position_ids: Any, length: int, offset: int = 0) -> int | None:
    """Look at positions in whatever form: [n], [1, n], or [k, 1, n] of models with several positions a token.

    Args:
        position_ids: a tensor, or None where the model counts itself.
        length: positions stored.
        offset: the position of the first token of all.

    Returns:
        The index of the first new token whose position is not the one that it is stored at, None if all follow.

    Raises:
        UnsupportedModelError: positions in one of the plain forms don't follow what is stored.
    """
    if not isinstance(position_ids, torch.Tensor) or not position_ids.numel():
        return None
    count = position_ids.shape[-1]
    if position_ids.ndim == 2 and position_ids.shape[0] != 1:
        return None  # a batch, which is refused for what it is
    rows = position_ids.reshape(-1, count).cpu()
    right = (rows == torch.arange(length + offset, length + offset + count)).all(0)
    if bool(right.all()):
        return None
    if position_ids.ndim <= 2:
        first, last = int(rows[0, 0]) - offset, int(rows[0, -1]) - offset
        raise UnsupportedModelError(
            f"tokens are fed for positions {first} to {last}, and the cache goes on at {length}; it takes no padding, "
            "no packed sequences, and not again what it has: give all token ids to reuse(cache, input_ids), and then "
            "to generate",
            expected=length,
            actual=first,
        )
    return int(torch.argmin(right.int()))


def check_padding(attention_mask: Any, total: int) -> None:
    """Refuse padding and holes in a mask [1, m] of stored and new tokens.

    Args:
        attention_mask: a tensor, or whatever else a model takes.
        total: positions stored, and new ones.

    Raises:
        UnsupportedModelError: it hides some of them, or says nothing of some.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or attention_mask.shape[0] != 1:
        return
    if attention_mask.shape[1] < total:
        raise UnsupportedModelError(
            f"attention_mask is for {attention_mask.shape[1]} tokens, and there are {total} with those in the cache; "
            "transformers would hide the others: give it for all of them, or leave it out",
            expected=total,
            actual=attention_mask.shape[1],
        )
    if not bool(attention_mask[0, :total].all()):
        hidden = torch.nonzero(attention_mask[0, :total] == 0)[0].item()
        raise UnsupportedModelError(
            f"attention_mask hides position {hidden}; a KvmmapCache takes no padding, and no holes: its keys and "
            "values would not belong to their token ids. Give the tokens without padding",
            actual=hidden,
        )


def is_plain(mask: Any, length: int, count: int, window: int | None, chunk: int | None = None) -> bool:
    """Whether a mask for attention is the causal one, within a window or chunks.

    Args:
        mask: [batch, heads, count, length + count], or without heads: bool, True where a query sees a key, or (MPT)
            where it does not; or numbers that are added to scores. Keys before the first query's window may be left
            out. Anything else is not plain.
        length: positions stored before the pass.
        count: new ones.
        window: positions that a query sees, its own among them; None: all.
        chunk: positions in a chunk, if a query sees only those of its own.
    """
    if isinstance(mask, torch.Tensor) and mask.ndim == 3:
        mask = mask[:, None]  # that of an indexer
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[2] != count:
        return False
    first = length + count - mask.shape[3]
    if first not in {0, 0 if window is None else max(length - window + 1, 0)}:
        return False
    seen = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.dtype is torch.bool and not bool(seen[..., -1, -1].any()):
        seen = ~seen  # every query sees itself: so True says what is hidden
    if count == 1 and chunk is None and (window is None or window > length - first):
        return bool(seen.all())
    positions = torch.arange(length, length + count, device=mask.device)[:, None]
    keys = torch.arange(first, length + count, device=mask.device)
    expected = keys <= positions
    if window is not None:
        expected &= keys > positions - window
    if chunk is not None:
        expected &= keys // chunk == positions // chunk
    return bool((seen == expected).all())


def _first(marks: NDArray[np.bool_]) -> int:
    """The index of the first True, or the length."""
    return int(np.argmax(marks)) if marks.any() else len(marks)
