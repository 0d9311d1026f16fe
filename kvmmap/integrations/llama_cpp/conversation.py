"""One conversation in one file: saved whole, appended to, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np

from ...cache import QuantizedKvCache
from ...errors import ModelMismatchError, UnknownTokensError
from ...formats.llama_cpp.exporting import check_model
from ...formats.portable import KEY, portable_notes
from ...metadata import document
from ...opening import making, open_cache
from ...paths import PathLike
from .context import Context

FACTS = "llama_cpp_context"
"""The metadata's key of what changes keys and values besides the weights."""


def save(
    llama: llama_cpp.Llama,
    path: PathLike,
    *,
    preset: str = "native",
    capacity: int | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Save what a `Llama` has computed as a cache, and return how many positions that is.

    Args:
        llama: the model, after `eval`, `generate` or a completion.
        path: of the cache to make; it appears when it is whole.
        preset: "native" keeps keys and values as the context has them; else one of `kvmmap.create`'s.
        capacity: positions to reserve, those of the context by default. It costs no disk.
        overwrite: replace a cache that is there.
        metadata: plain JSON of your own.

    Raises:
        UnsupportedModelError: a model whose states are not read.
        CacheExistsError, OSError: as in `kvmmap.create`.
    """
    context = Context(llama)
    ids = context.token_ids
    facts = context.facts
    model = facts.model
    own = {KEY: portable_notes("llama.cpp", model.member.portable_id(), model.weights), FACTS: facts.facts["llama_cpp"]}
    shape = facts.shape(preset) | {"capacity": max(len(ids), llama.n_ctx() if capacity is None else capacity)}
    with making(path, shape, document({**(metadata or {}), **own}, facts.info), overwrite=overwrite) as cache:
        context.store(cache, len(ids))
        cache.push_token_ids(ids)
    return len(ids)


def append(llama: llama_cpp.Llama | Context, cache: PathLike | QuantizedKvCache) -> int:
    """Append what a `Llama` has computed since to a cache that begins as it does, and make it survive power loss.

    Positions of the cache that differ from the context's are dropped first. With `spare_sequence` new positions alone
    are copied.

    Args:
        llama: the model.
        cache: a path, or a cache that is open for appending.

    Returns:
        How many positions were appended.

    Raises:
        ModelMismatchError: another model, or other types of keys and values, RoPE parameters or adapters made it.
        UnknownTokensError: the cache does not know its token ids.
        CapacityExceededError: it has no room: `kvmmap.resize` it.
        CacheLockedError, OSError: as in `kvmmap.open`.
    """
    context = llama if isinstance(llama, Context) else Context(llama)
    if not isinstance(cache, QuantizedKvCache):
        with open_cache(cache, "a") as opened:
            return append(context, opened)
    _check(cache, context, None)
    ids = context.token_ids
    same = _common(cache, ids)
    if same < cache.seq_len:
        cache.truncate(same)
    context.store(cache, len(ids))
    if len(ids) > same:
        cache.push_token_ids(ids[same:])
    cache.flush()
    return len(ids) - same


def load(
    llama: llama_cpp.Llama | Context, cache: PathLike | QuantizedKvCache, *, accept_weights: str | None = None
) -> int:
    """Load a cache into a `Llama`: a following `generate` of a prompt that begins with its tokens computes the rest
    alone.

    Args:
        llama: the model; what its context holds is replaced.
        cache: a path or URL, or an open cache: one of `save`, an import, or another program's in the portable form.
        accept_weights: as in `export_llama_cpp`.

    Returns:
        How many positions were loaded.

    Raises:
        ModelMismatchError: as `append`; or weights of another type made it, and are not accepted.
        UnknownTokensError: the cache does not know its token ids.
        CapacityExceededError: the context is too small.
        FormatError, CacheNotFoundError, OSError: as in `kvmmap.open`.
    """
    context = llama if isinstance(llama, Context) else Context(llama)
    if not isinstance(cache, QuantizedKvCache):
        with open_cache(cache) as opened:
            return load(context, opened, accept_weights=accept_weights)
    _check(cache, context, accept_weights)
    ids = cache.token_ids
    _common(cache, ids)
    context.restore(cache, len(ids))
    context.computed(ids)
    return len(ids)


def _check(cache: QuantizedKvCache, context: Context, accept_weights: str | None) -> None:
    check_model(cache, context.facts.model, accept_weights)
    here = context.facts.facts["llama_cpp"]
    there = cache.metadata.get(FACTS, {})
    differing = {name: (there[name], here.get(name)) for name in there if there[name] != here.get(name)}
    # Types of keys and values are the storage's business where rows are loaded.
    differing = {name: pair for name, pair in differing.items() if name in ("rope", "overrides", "adapter")}
    if differing:
        shown = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differing.items())
        raise ModelMismatchError(
            f"{cache.path or 'the cache'} was made otherwise: {shown}. Its keys and values mean nothing here",
            expected={name: old for name, (old, _) in differing.items()},
            actual={name: new for name, (_, new) in differing.items()},
            path=cache.path,
        )


def _common(cache: QuantizedKvCache, ids: Any) -> int:
    """Return how many of a cache's first token ids are these.

    Raises:
        UnknownTokensError: it does not know some of its ids.
    """
    stored = cache.token_ids
    unknown = np.flatnonzero(stored < 0)
    if len(unknown):
        raise UnknownTokensError(
            f"{cache.path or 'the cache'} does not know the token id of position {unknown[0]}: record them with "
            "cache.push_token_ids",
            position=int(unknown[0]),
            actual=len(stored),
            path=cache.path,
        )
    count = min(len(stored), len(ids))
    same = stored[:count] == np.asarray(ids[:count])
    return count if same.all() else int(np.argmin(same))
