"""Reuse of what is stored: how far a prompt agrees with it, and a cache cut back to there."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import ShapeMismatchError
from .cache import KvmmapCache


def reuse(cache: KvmmapCache, input_ids: Any) -> int:
    """Cut a cache back to the longest prefix that it shares with a prompt; then `generate` prefills only the rest.

    Give all of the prompt's ids to `generate` too, with the same cache. With mode="r" the file stays as it is, and so
    many processes may go on from it; with mode="a" what it has beyond the prefix is taken back for good.

    Args:
        cache: the cache.
        input_ids: the whole prompt, [n] or [1, n].

    Returns:
        How many tokens are reused: those that agree one by one from the start, but for the prompt's last one, which is
        always fed again, because its logits are not stored. A placeholder, such as for an image, ends the prefix: two
        images have the same ones.

    Raises:
        ShapeMismatchError: no tokens, or more than one sequence.
    """
    ids = np.asarray(input_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or not ids.size:
        raise ShapeMismatchError(
            f"input_ids must be the ids of one sequence, [n] or [1, n], not {list(ids.shape)}",
            expected=(1, "n"),
            actual=ids.shape,
        )
    length = common_prefix(cache.token_ids, ids[:-1], cache.placeholders)
    cache.truncate(length)
    return length


def common_prefix(stored: Any, ids: Any, placeholders: frozenset[int] = frozenset()) -> int:
    """Return how many ids two sequences share from their start."""
    count = min(len(stored), len(ids))
    ids = ids[:count]
    same = (stored[:count] == ids) & ~np.isin(ids, list(placeholders))
    return count if same.all() else int(np.argmin(same))
