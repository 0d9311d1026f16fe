"""Prompts, their rows, and a library to keep them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import kvmmap
from kvmmap.library import Session

LAYERS, HEADS, DIM = 2, 2, 8
SHAPE: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM}
NAMESPACE = kvmmap.Namespace.build(**SHAPE, model=kvmmap.ModelInfo(name="org/tiny", fingerprint="abc"))


def prompt(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids of several parts, one after the other."""
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def text(length: int, seed: int) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 50_000, length)


def rows_of(ids: np.ndarray, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [LAYERS, n, HEADS, DIM] of positions from `start` on: each depends on all ids up to its own."""
    state, states = 1, []
    for token in np.asarray(ids).tolist():
        state = (state * 1_000_003 + token + 1) % 2_147_483_647
        states.append(state)
    numbers = np.array(states[start:], np.int64)[None, :, None, None]
    places = np.arange(1, LAYERS * HEADS * DIM + 1).reshape(LAYERS, 1, HEADS, DIM)
    keys = ((numbers * places) % 9973 - 4986).astype(np.float32)
    return keys, keys[..., ::-1].copy()


def compute(session: Session, ids: np.ndarray, *, step: int | None = None) -> None:
    """Append what a session lacks of a prompt."""
    keys, values = rows_of(ids, session.reused)
    count = len(ids) - session.reused
    for low in range(0, count, step or max(count, 1)):
        high = min(low + (step or count), count)
        session.extend(keys[:, low:high], values[:, low:high], ids[session.reused + low : session.reused + high])


def say(library: kvmmap.Library, ids: np.ndarray, namespace: kvmmap.Namespace = NAMESPACE, **more: Any) -> int:
    """Have a session over a prompt; return how many positions it reused. What it reused must be the prompt's."""
    with library.session(namespace, ids, **more) as session:
        check_rows(session, ids[: session.reused])
        compute(session, ids)
        check_rows(session, ids)
        return session.reused


def check_rows(cache: kvmmap.QuantizedKvCache, ids: np.ndarray) -> None:
    """Assert that a cache begins with a prompt's token ids, and with their rows."""
    np.testing.assert_array_equal(cache.token_ids[: len(ids)], ids)
    if not len(ids):
        return
    keys, values = rows_of(ids)
    for layer, k, v in zip(cache.layers, keys, values, strict=True):
        for found, wanted in ((layer.read_keys(0, len(ids)), k), (layer.read_values(0, len(ids)), v)):
            scale = np.abs(wanted).max(axis=-1, keepdims=True) / 127
            assert (np.abs(found - wanted) <= scale * 0.51).all()


def check_consistent(library: kvmmap.Library) -> None:
    """Assert what always holds of an index, and that its files hold what it says."""
    library._index.check()
    for segment in library.entries():
        if segment.writing or segment.broken:
            continue
        with kvmmap.open(segment.path) as cache:
            assert cache.seq_len >= segment.stop
            check_rows(cache, cache.token_ids[: segment.stop])
