"""What the arguments of a forward pass tell: which tokens are fed, and whether attention is plainly causal.

Keys and values belong to their token ids only if each token has the position that it is stored at and attends to all
tokens before it (within the layer's window), and if nothing but token ids went in. Passes that plainly don't are
refused; where a pass may be what the caller wants (masks of its own, embeddings), it is stored with unknown token ids.

Pure: knows no models, hooks or caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import UnsupportedModelError


class RopePositions(NamedTuple):
    """What `check_rope` has found."""

    wrong: int | None
    """The index of the first text token whose positions are not those that come next; None: all are."""

    like_text: NDArray[np.bool_]
    """Of each token, whether its positions are those of a text token."""

    deltas: NDArray[np.int64]
    """Behind each token, how far the position of the next text token is from where that is stored."""


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
        end = 0 if any(_affects(*item, bool(placeholders)) for item in given.items()) else len(found)
    end = min(end, _first(found < 0))
    return found[:end]


def has_effect(name: str, value: Any) -> bool:
    """Return whether an argument may change keys and values besides token ids and positions."""
    if name in _NEUTRAL or value is None:
        return False
    if isinstance(value, Mapping):  # features that were computed before: "mm_encoder_outputs"
        return any(inner is not None for inner in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(item, str | int | float | torch.Tensor | list | tuple) for item in value)
    return isinstance(value, torch.Tensor)


def _affects(name: str, value: Any, multimodal: bool) -> bool:
    """As `has_effect`, for tokens without placeholders."""
    if name.endswith("token_type_ids") and multimodal and isinstance(value, torch.Tensor):
        return bool(value.any())  # zeros: text
    return has_effect(name, value)


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


def check_rope(position_ids: torch.Tensor, start: int, delta: int, media: NDArray[np.bool_]) -> RopePositions:
    """Look at positions [k, 1, n] of a model with several positions a token.

    A text token's positions are all one behind the greatest one before it. Those of an image's tokens follow its grid.

    Args:
        position_ids: of new tokens; of four rows the first one counts tokens.
        start: positions stored.
        delta: how far the position of the next text token is from `start`.
        media: True for the new tokens that stand for a part of an image, or the like.
    """
    rows = position_ids.reshape(-1, position_ids.shape[-1]).cpu().numpy()
    wrong = np.zeros(rows.shape[1], bool)
    if len(rows) == 4:
        wrong = rows[0] != np.arange(start, start + rows.shape[1])
        if wrong.all() and (rows == rows[0]).all():  # all rows are those of rotation
            wrong[:] = False
        rows = rows[1:]
    greatest = np.maximum.accumulate(np.concatenate([[start + delta - 1], rows.max(0)]))
    texts = (rows == greatest[:-1] + 1).all(0)
    wrong |= ~texts & ~media
    return RopePositions(
        wrong=int(np.argmax(wrong)) if wrong.any() else None,
        like_text=texts,
        deltas=greatest[1:] + 1 - np.arange(start + 1, start + 1 + rows.shape[1]),
    )


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


def is_plain(
    mask: Any,
    length: int,
    count: int,
    window: int | None,
    chunk: int | None = None,
    blocks: Sequence[tuple[int, int]] = (),
) -> bool:
    """Whether a mask for attention is the causal one, within a window or chunks.

    Args:
        mask: [batch, heads, count, length + count], or without heads: bool, True where a query sees a key, or (MPT)
            where it does not; or numbers that are added to scores. Keys before the first query's window may be left
            out. Anything else is not plain.
        length: positions stored before the pass.
        count: new ones.
        window: positions that a query sees, its own among them; None: all.
        chunk: positions in a chunk, if a query sees only those of its own.
        blocks: ranges of new positions that see one another in both directions.
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
    for start, stop in blocks:
        expected[start - length : stop - length, start - first : stop - first] = True
    return bool((seen == expected).all())


def _first(marks: NDArray[np.bool_]) -> int:
    """The index of the first True, or the length."""
    return int(np.argmax(marks)) if marks.any() else len(marks)
