"""Statistics of a whole cache: one pass over its codes and scales, layer by layer, in bounded memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..codecs import INT8
from ..geometry import LayerGeometry
from ..layer import QuantizedKvLayer
from ..quantize import MIN_SCALE, quantize_rows
from ..rows import Rows
from ..storage.protocols import Progress
from .tally import ChannelOutlier, PositionOutlier, RowStatistics, Tally

Part = Literal["keys", "values"]
PARTS: tuple[Part, Part] = ("keys", "values")

STEP_NUMBERS = 1 << 20
"""Codes that are processed together."""

MOST_OUTLIERS = 16
"""How many outliers of a kind are kept."""

CHANNEL_RATIO = 4.0
"""A channel is an outlier if its root mean square is this many times that of the layer's median channel."""

POSITION_RATIO = 4.0
"""A position is an outlier if one of its scales is this many times the mean scale of its head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """One layer."""

    index: int
    """Which one, from 0."""

    keys: RowStatistics
    """Statistics of all key rows."""

    values: RowStatistics
    """Statistics of all value rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """Outliers, largest first, at most `MOST_OUTLIERS` each. Outliers of keys affect attention most."""

    key_channels: tuple[ChannelOutlier, ...]
    """Channels of keys that are larger than the others."""

    value_channels: tuple[ChannelOutlier, ...]
    """Channels of values, likewise."""

    key_positions: tuple[PositionOutlier, ...]
    """Key rows with a scale that is larger than the others of their head."""

    value_positions: tuple[PositionOutlier, ...]
    """Value rows, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """A whole cache, at one moment."""

    seq_len: int
    """Positions, in every layer."""

    keys: RowStatistics
    """Statistics of the key rows of all layers."""

    values: RowStatistics
    """Statistics of the value rows of all layers."""

    layers: tuple[LayerStatistics, ...]
    """One a layer that was asked for, in order."""

    outliers: Outliers
    """Outliers over all layers."""

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON types."""
        plain = asdict(self)
        plain["layers"] = list(plain["layers"])
        return plain


def statistics(
    cache: QuantizedKvCache, layers: list[int] | None = None, *, progress: Progress | None = None
) -> CacheStatistics:
    """Look at every stored row of a cache; layers without rows are left out.

    Rows of other codecs are decoded, and quantised to int8 for these figures.

    Args:
        cache: an open cache; at most a few MiB of it are worked on at a time.
        layers: only these, by index; all by default.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        LayerOutOfRangeError: there is no such layer.
        CacheChangedError: the writer truncated meanwhile: refresh, and try again.
        ClosedError: the cache is closed.
    """
    length = cache.seq_len
    wanted = [layer for layer in cache.layers.chosen(layers) if cache.geometry.layers[layer].has_rows]
    total = length * sum(cache.geometry.layers[layer].position_bytes for layer in wanted)
    whole = {part: Tally() for part in PARTS}
    channels: dict[Part, list[ChannelOutlier]] = {part: [] for part in PARTS}
    positions: dict[Part, list[PositionOutlier]] = {part: [] for part in PARTS}
    results, done = [], 0
    for number in wanted:
        layer = cache.layers[number]
        looks = {part: _Look(number, layer.num_kv_heads) for part in PARTS}
        for start, rows in int8_parts(layer, length):
            looks["keys"].add(start, rows.key_codes, rows.key_scales)
            looks["values"].add(start, rows.value_codes, rows.value_scales)
            done += rows.num_positions * layer.geometry.position_bytes
            if progress:
                progress(done, total)
        for part, look in looks.items():
            whole[part].merge(look.tally)
            channels[part] = heapq.nlargest(MOST_OUTLIERS, [*channels[part], *look.channels()])
            positions[part] = heapq.nlargest(MOST_OUTLIERS, [*positions[part], *look.positions()])
        keys, values = (looks[part].tally.result() for part in PARTS)
        results.append(LayerStatistics(index=number, keys=keys, values=values))
    return CacheStatistics(
        seq_len=length,
        keys=whole["keys"].result(),
        values=whole["values"].result(),
        layers=tuple(results),
        outliers=Outliers(
            key_channels=tuple(channels["keys"]),
            value_channels=tuple(channels["values"]),
            key_positions=tuple(positions["keys"]),
            value_positions=tuple(positions["values"]),
        ),
    )


def read_parts(layer: QuantizedKvLayer, stop: int) -> Iterator[tuple[int, Rows]]:
    """Yield (first position, rows) of a layer's positions below `stop`, a few MiB at a time.

    Raises:
        CacheChangedError: the writer truncated meanwhile; at the next part, or after the last.
    """
    step = max(1, STEP_NUMBERS // (layer.num_kv_heads * (layer.head_dim + layer.value_head_dim)))
    for start in range(0, stop, step):
        yield start, layer.read_quantized(start, min(start + step, stop))
    layer.read_quantized(0, 0)


def int8_parts(layer: QuantizedKvLayer, stop: int) -> Iterator[tuple[int, Rows]]:
    """As `read_parts`, but of any codec as int8 rows: other rows are decoded, and quantised for these figures."""
    geometry = layer.geometry
    same = geometry.key_codec is INT8 and geometry.value_codec is INT8
    for start, rows in read_parts(layer, stop):
        yield start, rows if same else _as_int8(rows, geometry)


def _as_int8(rows: Rows, geometry: LayerGeometry) -> Rows:
    keys = geometry.key_codec.decoded(rows.keys, geometry.head_dim)
    values = geometry.value_codec.decoded(rows.values, geometry.value_head_dim)
    plain = LayerGeometry(geometry.num_kv_heads, geometry.head_dim, geometry.value_head_dim)
    return Rows.of(plain, (*quantize_rows(keys), *quantize_rows(values)))


class _Look:
    """One pass over one part of one layer."""

    def __init__(self, layer: int, heads: int) -> None:
        self.layer = layer
        self.tally = Tally()
        self.power: NDArray[np.float64] | float = 0.0  # of each channel, [heads, dim]
        self.scale_sum = np.zeros(heads)
        self.peaks = np.zeros((0, heads), np.float32)  # each head's largest scales so far, and where they are
        self.places = np.zeros((0, heads), np.int64)

    def add(self, start: int, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
        self.power = self.power + self.tally.add(codes, scales)
        self.scale_sum += scales.sum(axis=0, dtype=np.float64)
        peaks = np.concatenate([self.peaks, scales])
        here = np.broadcast_to(np.arange(start, start + len(scales))[:, None], scales.shape)
        places = np.concatenate([self.places, here])
        if len(peaks) > MOST_OUTLIERS:
            best = np.argpartition(peaks, -MOST_OUTLIERS, axis=0)[-MOST_OUTLIERS:]
            peaks, places = np.take_along_axis(peaks, best, axis=0), np.take_along_axis(places, best, axis=0)
        self.peaks, self.places = peaks, places

    def positions(self) -> list[PositionOutlier]:
        """Return the rows that stand out, each position but once."""
        positions = self.tally.rows // len(self.scale_sum)
        ratios = self.peaks * (positions / np.maximum(self.scale_sum, MIN_SCALE))
        found: dict[int, PositionOutlier] = {}
        for peak, head in np.argwhere(ratios > POSITION_RATIO).tolist():
            outlier = PositionOutlier(
                ratio=float(ratios[peak, head]), layer=self.layer, position=int(self.places[peak, head]), head=head
            )
            found[outlier.position] = max(outlier, found.get(outlier.position, outlier))
        return heapq.nlargest(MOST_OUTLIERS, found.values())

    def channels(self) -> list[ChannelOutlier]:
        """Return the channels that stand out."""
        size = np.sqrt(np.atleast_2d(self.power))
        median = float(np.median(size))
        found = np.argwhere(size > CHANNEL_RATIO * median).tolist() if median else []
        return heapq.nlargest(
            MOST_OUTLIERS,
            (
                ChannelOutlier(ratio=float(size[head, channel]) / median, layer=self.layer, head=head, channel=channel)
                for head, channel in found
            ),
        )
