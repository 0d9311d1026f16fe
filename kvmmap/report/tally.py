"""Statistics of quantised rows, counted block by block, and what follows from the counts.

A `Tally` takes any number of blocks in bounded memory, and tallies add up, so that a layer's and a cache's figures come
from one pass. It knows codes and scales, not where they lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

OUTLIER_CREST = 5.0
"""A row is an outlier row if its largest number is more than this many times its root mean square. Gaussian rows of 128
numbers are so once in 14,000; a row in which one channel dwarfs the others has only a few codes left for the rest."""

_CODE = 127
_BIN_BITS = 16  # a scale, which is positive, is counted by the upper bits of its f32: bins of 1/128 octave


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleStatistics:
    """How scales are distributed; zero rows, whose scale says nothing, are left out."""

    smallest: float
    """The smallest scale."""

    p01: float
    """A hundredth of the rows have a smaller one; percentiles are right to 0.4 %."""

    median: float
    """Half of the rows have a smaller one."""

    p99: float
    """A hundredth of the rows have a larger one."""

    largest: float
    """The largest scale."""

    mean: float
    """The arithmetic mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """Rows of keys or of values: of one layer, or of all.

    Figures are of int8 rows. Rows of another codec are decoded first, so scales, codes and errors are those that int8
    would have.
    """

    rows: int
    """Number of rows: positions times heads."""

    zero_rows: int
    """Rows that are zero throughout."""

    scales: ScaleStatistics | None
    """None if there are no rows but zero rows."""

    crest: float
    """Mean over the rows of largest number / root mean square: 2.8 for gaussian rows of 128, at most
    sqrt(head_dim). 0.0 if all rows are zero."""

    outlier_ratio: float
    """Share of rows whose crest is over `OUTLIER_CREST`; it can't be if head_dim is 25 or less."""

    saturation: float
    """Share of codes that are -127 or 127. Each row has one at least, unless it is zero: its largest number."""

    entropy: float
    """Bits a code holds, if codes are taken one by one: what an ideal coder that knows only how often each code
    occurs would need. 8.0 at most."""

    error_bound: float
    """No number is off by more than this: half the largest scale, up to f32 rounding."""

    rms_error: float
    """Root mean square of the quantisation error, estimated: an error is as likely to be anywhere within half a
    scale, so a row's is scale / sqrt(12) (Widrow and Kollar, "Quantization Noise", 2008, chapter 3)."""

    relative_error: float
    """`rms_error` over the root mean square of the numbers themselves. 0.0 if all are zero."""

    code_counts: tuple[int, ...]
    """How often each code occurs, from -127 to 127."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PositionOutlier:
    """A row whose scale stands out among those of its head."""

    ratio: float
    """Its scale over the mean scale of the head's rows."""

    layer: int
    """The layer that it is in."""

    position: int
    """The token's index."""

    head: int
    """The KV head."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ChannelOutlier:
    """A channel (one number of a head's row) that stands out of its layer."""

    ratio: float
    """Its root mean square over all positions, over the median channel's."""

    layer: int
    """The layer that it is in."""

    head: int
    """The KV head."""

    channel: int
    """Index in the row, from 0 to head_dim - 1."""


@dataclass(slots=True)
class Tally:
    """Counts of rows seen so far."""

    rows: int = 0
    zero_rows: int = 0
    outlier_rows: int = 0
    crest_sum: float = 0.0
    numbers: int = 0
    square_sum: float = 0.0
    noise_sum: float = 0.0
    scale_sum: float = 0.0
    smallest: float = math.inf
    largest: float = 0.0
    codes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """By the code's bits as u8."""
    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 << 31 - _BIN_BITS, np.int64))
    """Scales of rows that are not zero, by the upper bits of their f32."""

    def add(self, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float64]:
        """Count a block: codes [n, heads, dim], scales [n, heads]. Return channels' sums of squares, [heads, dim]."""
        dim = codes.shape[-1]
        squares = codes.astype(np.float32)
        np.square(squares, out=squares)
        power = squares @ np.ones(dim, np.float32)  # of a row's codes, [n, heads]
        weight = np.square(scales, dtype=np.float64)
        alive = power > 0
        crest = _CODE * math.sqrt(dim) / np.sqrt(power[alive])
        self.rows += scales.size
        self.zero_rows += scales.size - len(crest)
        self.outlier_rows += int((crest > OUTLIER_CREST).sum())
        self.crest_sum += float(crest.sum(dtype=np.float64))
        self.numbers += codes.size
        self.square_sum += float((power * weight).sum())
        self.codes += np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)
        self._add_scales(scales[alive], dim)
        return _channel_power(squares, weight)

    def _add_scales(self, scales: NDArray[np.float32], dim: int) -> None:
        if not len(scales):
            return
        wide = scales.astype(np.float64)
        self.scale_sum += float(wide.sum())
        self.noise_sum += float(np.square(wide).sum()) * dim / 12
        self.smallest = min(self.smallest, float(scales.min()))
        self.largest = max(self.largest, float(scales.max()))
        self.bins += np.bincount(scales.view(np.uint32) >> _BIN_BITS, minlength=len(self.bins))

    def merge(self, other: Tally) -> Self:
        """Add another tally's counts to this one."""
        for name in ("rows", "zero_rows", "outlier_rows", "crest_sum", "numbers", "square_sum", "noise_sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.scale_sum += other.scale_sum
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        self.codes += other.codes
        self.bins += other.bins
        return self

    def _percentile(self, share: float) -> float:
        """Return the middle of the bin that the share falls in, kept within what was seen."""
        rank = share * (self.rows - self.zero_rows - 1)
        bin = int(np.searchsorted(np.cumsum(self.bins), rank, side="right"))
        edges = np.array([bin, bin + 1], np.uint32) << _BIN_BITS
        middle = float(edges.view(np.float32).astype(np.float64).mean())
        return min(max(middle, self.smallest), self.largest)

    def result(self) -> RowStatistics:
        """Return what the counts say."""
        alive, numbers = self.rows - self.zero_rows, max(self.numbers, 1)
        counts = np.concatenate([self.codes[129:], self.codes[:128]])
        shares = counts[counts > 0] / numbers
        signal, noise = math.sqrt(self.square_sum / numbers), math.sqrt(self.noise_sum / numbers)
        return RowStatistics(
            rows=self.rows,
            zero_rows=self.zero_rows,
            scales=self._scales() if alive else None,
            crest=self.crest_sum / alive if alive else 0.0,
            outlier_ratio=self.outlier_rows / self.rows if self.rows else 0.0,
            saturation=float(counts[0] + counts[-1]) / numbers,
            entropy=max(0.0, float(-(shares * np.log2(shares)).sum())),
            error_bound=self.largest / 2,
            rms_error=noise,
            relative_error=noise / signal if signal else 0.0,
            code_counts=tuple(counts.tolist()),
        )

    def _scales(self) -> ScaleStatistics:
        return ScaleStatistics(
            smallest=self.smallest,
            p01=self._percentile(0.01),
            median=self._percentile(0.5),
            p99=self._percentile(0.99),
            largest=self.largest,
            mean=self.scale_sum / (self.rows - self.zero_rows),
        )


def _channel_power(squares: NDArray[np.float32], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum over positions of squares [n, heads, dim] times weight [n, heads]: f64 [heads, dim]."""
    most = float(weight.max(initial=0.0)) or 1.0
    small = (weight / most).astype(np.float32)  # squares of scales need not fit f32, and f64 is far slower here
    sums: NDArray[np.float32] = np.matmul(small.T[:, None, :], squares.transpose(1, 0, 2))[:, 0]
    return np.multiply(sums, most, dtype=np.float64)
