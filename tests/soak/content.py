"""The rows of a soak's cache, which encode their position and their *epoch*.

An epoch is a number that grows with every writer and every truncation, so that a row of a position that was truncated,
or that a killed writer left incomplete, is told from the present one. Everything is exact in the codec:
a scale is a power of two and the first code of a row is 127. So it is in 16 bits: whether a position has its coded row
or one of the recent window makes no difference, and a row of another position, or of an earlier epoch, does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import kvmmap

LAYERS, HEADS, DIM = 3, 2, 16
WINDOW, SINKS = 48, 4
_DIGIT = 200  # epochs lie in codes 1 to 3 of each row, in this base


class WrongBytesError(AssertionError):
    """A cache returned bytes that were never stored there."""


def codes_of(layer: int, value: bool, positions: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.int8]:
    """int8 [n, HEADS, DIM]."""
    seeds = positions * 7919 + epochs * 104_729 + layer * 1_299_709 + value * 15_485_863
    grid = np.arange(HEADS * DIM).reshape(HEADS, DIM) * 40_503
    codes = ((seeds[:, None, None] * 2_654_435_761 + grid) >> 9) % 255 - 127
    codes[..., 0] = 127
    for digit in range(3):
        codes[..., 1 + digit] = (epochs // _DIGIT**digit % _DIGIT - 100)[:, None]
    return codes.astype(np.int8)


def scales_of(layer: int, value: bool, positions: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.float32]:
    """f32 [n, HEADS]."""
    seeds = positions * 37 + epochs * 11 + layer * 5 + value
    return (2.0 ** ((seeds[:, None] + np.arange(HEADS)) % 8 - 4)).astype(np.float32)


def rows_of(value: bool, positions: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.float32]:
    """f32 [LAYERS, n, HEADS, DIM]: what to append."""
    return np.stack(
        [
            codes_of(layer, value, positions, epochs) * scales_of(layer, value, positions, epochs)[..., None]
            for layer in range(LAYERS)
        ]
    )


def epochs_in(key_codes: NDArray[np.int8]) -> NDArray[np.int64]:
    """Epochs as the rows tell them, int64 [n]."""
    digits = key_codes[:, 0, 1:4].astype(np.int64) + 100
    result: NDArray[np.int64] = digits @ (_DIGIT ** np.arange(3))
    return result


def verify_rows(cache: kvmmap.QuantizedKvCache, start: int, stop: int) -> NDArray[np.int64]:
    """Compare every code and scale of positions [start, stop) and return their epochs.

    Raises:
        WrongBytesError: one is not as it was stored.
        CacheChangedError: rows were truncated meanwhile, so nothing was compared.
    """
    taken = [layer.read_quantized(start, stop) for layer in cache.layers]
    copies = [[np.array(array) for array in rows] for rows in taken]
    ids = cache.token_ids[start:stop].astype(np.int64)
    cache.storage.check()  # what was copied was the cache's when it had been copied
    positions = np.arange(start, stop)
    epochs = epochs_in(copies[0][0])
    for layer, found in enumerate(copies):
        for number, name in enumerate(("key codes", "key scales", "value codes", "value scales")):
            make = scales_of if number % 2 else codes_of
            expected = make(layer, number >= 2, positions, epochs)
            if not np.array_equal(found[number], expected):
                bad = int(np.argmax((found[number] != expected).reshape(len(positions), -1).any(axis=1)))
                raise WrongBytesError(
                    f"layer {layer}, {name}, position {start + bad}: {found[number][bad].ravel()[:8]} for "
                    f"{expected[bad].ravel()[:8]} of epoch {epochs[bad]}"
                )
    if (np.diff(epochs) < 0).any():
        raise WrongBytesError(f"positions [{start}, {stop}): rows of an earlier epoch after those of a later one")
    if len(ids) != len(epochs) or not np.all((ids == epochs) | (ids == -1)):
        raise WrongBytesError(f"positions [{start}, {stop}): token ids are of other rows: {ids[:8]} for {epochs[:8]}")
    return epochs


def check_recent(cache: kvmmap.QuantizedKvCache, epochs: NDArray[np.int64]) -> int:
    """Compare what is read of the last and the first positions, and return how many rows in 16 bits there are.

    Raises:
        WrongBytesError: one is not as it was stored.
    """
    length, held = len(epochs), 0
    for start, stop in ((max(0, length - 2 * WINDOW), length), (0, min(length, 2 * SINKS))):
        positions = np.arange(start, stop)
        for number, layer in enumerate(cache.layers):
            for value, read in ((False, layer.read_keys), (True, layer.read_values)):
                if not np.array_equal(read(start, stop), rows_of(value, positions, epochs[start:stop])[number]):
                    raise WrongBytesError(f"layer {number}: rows of [{start}, {stop}) are read that were not stored")
    for layer in cache.layers:
        rows = layer.recent_rows()
        assert rows is not None
        held += rows.num_held(length)
    return held


def check_attention(cache: kvmmap.QuantizedKvCache, layer: int, start: int, epochs: NDArray[np.int64]) -> None:
    """Attend over positions from `start` on and compare with what was stored there.

    Raises:
        WrongBytesError, CacheChangedError: as `verify_rows`.
    """
    positions = np.arange(start, start + len(epochs))
    query = np.random.default_rng(start).standard_normal((1, HEADS, DIM), dtype=np.float32) / 32
    out = cache.layers[layer].attend(query, positions=(start, start + len(epochs)), causal=False, scale=1 / 16)
    keys = codes_of(layer, False, positions, epochs) * scales_of(layer, False, positions, epochs)[..., None]
    values = codes_of(layer, True, positions, epochs) * scales_of(layer, True, positions, epochs)[..., None]
    scores = np.einsum("hd,nhd->hn", query[0].astype(np.float64), keys) / 16
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.einsum("hn,nhd->hd", weights, values)
    if np.abs(out[0] - expected).max() > 2e-5 * np.abs(values).max():
        raise WrongBytesError(f"layer {layer}: attention over [{start}, {start + len(epochs)}) is not of these rows")
