"""Sequences that begin with what one cache holds: the beginning is shared, and what follows is kept in memory."""

from __future__ import annotations

from ...cache import QuantizedKvCache
from ...errors import KvmmapError
from .cache import KvmmapCache
from .opening import record_known, room_beside, spread_like


def branch(cache: KvmmapCache, room: int | None) -> KvmmapCache:
    """Return a cache that begins with what another one holds, without a copy of it.

    Args:
        cache: must stay open. The branch sees what it holds now.
        room: positions to reserve for what follows; as many as a file that is only read has by default.

    Raises:
        KvmmapError: it holds positions in memory beside those of its file.
    """
    cache._settle()
    beginning = cache._own if cache._saved is None else cache._saved
    if cache._saved is not None and cache._own.seq_len:
        raise KvmmapError(
            f"{cache!r} holds {cache._own.seq_len} positions in memory beside those of its file: save it with "
            "cache.save(path), and open that",
            actual=cache._own.seq_len,
        )
    cache.checkpoint()  # the branches begin with the states of this position
    room = room_beside(beginning) if room is None else room
    own = QuantizedKvCache(**spread_like(beginning, room, cache.seq_len), model=beginning.model)
    made = type(cache)._of(beginning, own, cache._kinds, cache._model())
    made.truncate(cache.seq_len)
    return made


def copy_branch(source: KvmmapCache, target: KvmmapCache) -> KvmmapCache:
    """Let a branch hold what another branch of the same beginning holds; return it."""
    target.truncate(0 if target._kept != source._kept else target._kept)
    for number in target._own.geometry.row_layers:
        target._own.layers[number].extend_from(source._own.layers[number])
    record_known(target._own, source._own.token_ids)
    target._length, target._regimes = source._length, [list(regime) for regime in source._regimes]
    target._media.become(source._media)
    return target
