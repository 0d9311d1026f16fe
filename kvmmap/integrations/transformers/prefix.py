"""Reuse of what is stored: how far a prompt agrees with it, and a cache cut back to there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import DtypeError, ShapeMismatchError, UnknownTokensError
from .cache import KvmmapCache


def reuse(cache: KvmmapCache, input_ids: Any = None, *, discard: bool | None = None, **inputs: Any) -> int:
    """Cut a cache back to the longest prefix that it shares with a prompt; then `generate` prefills only the rest.

    Give all of the prompt's ids to `generate` too, with the same cache. With mode="r" the file stays as it is, and so
    many processes may go on from it. With mode="a" the file loses what it has beyond the prefix, if other token ids are
    recorded for it. `cache.fork(path)` makes a copy first; discard=False refuses to lose anything.

    Args:
        cache: the cache.
        input_ids: the whole prompt, [n] or [1, n]. Of an encoder-decoder the decoder's; or the encoder's, if the
            decoder's are given as `decoder_input_ids`, as to `generate`.
        discard: what of a file that is open for appending may be lost: None, what is known to differ from the prompt;
            True, also positions whose token ids are not known; False, nothing.
        inputs: what else a processor made of the prompt, for prompts with images, videos or audio: pixel values, grids,
            token types, ... `reuse(cache, **processed)`, and then `generate(**processed, **cache.argument)`. Of an
            encoder-decoder, or a model with cross-attention layers, all that the encoder is given.

    Returns:
        How many tokens are reused: those that agree one by one from the start, but for the prompt's last one, which is
        always fed again, because its logits are not stored. An image (video, audio) is reused whole if its tensors are
        the same, bit by bit; one that is not among `inputs` ends the prefix. Of a model with states, up to the last
        checkpoint of these. It is `cache.seq_len` afterwards.

    Raises:
        ShapeMismatchError: no tokens, or more than one sequence.
        DtypeError: something else than whole numbers.
        UnknownTokensError: it is not known which tokens the cache holds, or with which source it was made; or, with
            discard=False, positions of the file would be lost. Nothing has changed.
    """
    input_ids, inputs = cache.own_ids(input_ids, inputs)
    ids = one_sequence(input_ids)
    if not discard and cache.same_source(inputs) is None:
        raise UnknownTokensError(
            f"{cache.path or 'the cache'} holds {cache.seq_len} positions that depend on a source (an encoder's "
            "output, an image), and it can't be told whether the prompt has the same one: give all inputs of generate "
            "to reuse(cache, **inputs), or drop these positions by discard=True",
            position=0,
            actual=cache.seq_len,
            path=cache.path,
        )
    stored = cache.token_ids
    count = common_prefix(stored, ids[:-1])
    count = cache.agreeing(min(count, cache.valid_prefix(len(ids))), ids, inputs)
    length = cache.restorable(count)
    unknown = length == count and count < min(len(stored), len(ids) - 1) and stored[count] < 0
    lost = len(stored) - length if cache.writable and cache.path is not None else 0
    if not discard and ((unknown and (lost or not length)) or (lost and discard is False)):
        where = cache.path or "the cache"
        if unknown:
            message = (
                f"{where} holds {len(stored)} positions, and does not know the token ids of those from {count} on (it "
                "was fed embeddings, with a mask of its own, or by a model that it was not opened with): give all ids "
                "to cache.record_token_ids(input_ids), or drop these positions by discard=True"
            )
        else:
            message = (
                f"{where} holds {len(stored)} positions, and shares {length} with the prompt: the others would be "
                f"lost. cache.fork(path, {length}) copies what is shared into another file; discard=True drops the "
                "others"
            )
        raise UnknownTokensError(message, position=length, actual=len(stored), path=cache.path)
    cache.truncate(length)
    return length


def one_sequence(input_ids: Any) -> NDArray[Any]:
    """Return the ids of a prompt, [n]."""
    ids = input_ids.detach().cpu().numpy() if isinstance(input_ids, torch.Tensor) else np.asarray(input_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or not ids.size:
        raise ShapeMismatchError(
            f"input_ids must be the ids of one sequence, [n] or [1, n], not {list(ids.shape)}",
            expected=(1, "n"),
            actual=ids.shape,
        )
    if ids.dtype.kind not in "iu":
        raise DtypeError(f"input_ids must be whole numbers, not {ids.dtype}", expected="int", actual=str(ids.dtype))
    return ids


def common_prefix(stored: Any, ids: Any) -> int:
    """Return how many ids two sequences share from their start; ids below 0 are not known."""
    count = min(len(stored), len(ids))
    ids = ids[:count]
    same = (stored[:count] == ids) & (ids >= 0)
    return count if same.all() else int(np.argmin(same))
