"""Pictures made of characters: heat maps of scales, and histograms of codes. Plain numbers in, rich texts out.

Where the terminal has colours and block characters, a character is two cells of a heat map, one above the other.
Elsewhere it is one cell, and darkness stands for colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .output import NARROWEST, can_show

if TYPE_CHECKING:
    from rich.text import Text

    from kvmmap.report import RowStatistics, ScaleGrid

# Viridis (Smith and van der Walt), every 32nd of its 256 colours: even steps to the eye, also to a colour-blind one.
VIRIDIS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (110, 206, 88),
    (181, 222, 43),
    (253, 231, 37),
)
SHADES = " .:-=+*#%@"
EIGHTHS = " ▁▂▃▄▅▆▇█"
MOST_HEADS = 16
MOST_LINES = 32
LABEL_WIDTH = 4
GAP = "  "

Array = NDArray[np.float64]


def colour(share: float) -> tuple[int, int, int]:
    """Return the colour of a number from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True))
    return red, green, blue


def shares_of(cells: Array) -> tuple[Array, float, float]:
    """Return cells as shares of the way from the lowest to the highest, by their logarithm, and these two.

    The lowest and highest hundredth are clipped, so that one cell can't make all others look alike.
    """
    known = cells[np.isfinite(cells) & (cells > 0)]
    if not known.size:
        return np.zeros_like(cells), 0.0, 0.0
    low, high = np.quantile(known, [0.01, 0.99])
    if high <= low * 1.0001:
        return np.full_like(cells, 0.5), float(low), float(high)
    with np.errstate(divide="ignore"):
        shares = (np.log(cells) - math.log(low)) / (math.log(high) - math.log(low))
    return np.clip(shares, 0, 1), float(low), float(high)


def merge(cells: Array, most: int) -> Array:
    """Average neighbouring rows until there are at most `most`."""
    if len(cells) <= most:
        return cells
    edges = np.linspace(0, len(cells), most + 1).round().astype(int)
    return np.stack([cells[start:stop].mean(axis=0) for start, stop in pairwise(edges)])


def heat_maps(grids: Sequence[ScaleGrid], width: int, *, colours: bool) -> Iterator[Text]:
    """Yield keys and values side by side: each layer's heads, averaged over positions, then its positions.

    A single layer has one row a head instead, and no strip of heads.
    """
    from rich.text import Text

    blocks = colours and can_show("▀")
    alone = len(grids) == 1
    parts = []
    for name in ("keys", "values"):
        cells = [getattr(grid, name).astype(np.float64) for grid in grids]
        over_positions = cells[0] if alone else np.stack([grid.mean(axis=0) for grid in cells])
        parts.append((name, None if alone else _heads(cells), over_positions))
    wide = (max(width, NARROWEST) - LABEL_WIDTH - len(GAP)) // 2
    lines = [list(_panel(name, heads, cells, wide, blocks)) for name, heads, cells in parts]
    names = [str(head) for head in range(len(parts[0][2]))] if alone else [str(grid.layer) for grid in grids]
    labels = list(_labels(names, blocks))
    positions = f"by position, 0 to {int(grids[0].edges[-1]):,}"
    title = f"head  scales {positions}" if alone else f"layer  scales by head, then {positions}"
    yield Text(title, "dim")
    for number, (left, right) in enumerate(zip(*lines, strict=True)):
        label = labels[number - 1] if 0 < number <= len(labels) else ""
        left.pad_right(max(0, wide - left.cell_len))
        yield Text.assemble((label.rjust(LABEL_WIDTH - 1) + " ", "dim"), left, GAP, right)


def _heads(cells: list[Array]) -> Array:
    """Return [layers, heads] of means over positions; NaN where a layer has fewer heads than another."""
    means = [merge(grid.mean(axis=1)[:, None], MOST_HEADS)[:, 0] for grid in cells]
    table = np.full((len(cells), max(map(len, means))), np.nan)
    for row, mean in zip(table, means, strict=True):
        row[: len(mean)] = mean
    return table


def _panel(name: str, heads: Array | None, cells: Array, width: int, blocks: bool) -> Iterator[Text]:
    """Yield a title, the rows, and the scale of one picture."""
    from rich.text import Text

    strip = 0 if heads is None else heads.shape[1] + 1
    wide = _columns(cells, max(1, width - strip))
    shown = wide if heads is None else np.hstack([heads, np.full((len(cells), 1), np.nan), wide])
    shares, low, high = shares_of(merge(shown, MOST_LINES * (2 if blocks else 1)))
    yield Text(name, "bold")
    yield from _rows(shares, blocks)
    ramp = Text.assemble(*(("█", _style(step / 11)) for step in range(12))) if blocks else Text(SHADES)
    yield Text.assemble((f"{low:.2g} ", "dim"), ramp, (f" {high:.2g}", "dim"))


def _columns(cells: Array, width: int) -> Array:
    """Bring [rows, bins] to `width` columns: averaged if there are more, repeated if there are few."""
    bins = cells.shape[1]
    if not bins:
        return cells
    if bins > width:
        return merge(cells.T, width).T
    return np.repeat(cells, max(1, width // bins), axis=1)


def _rows(shares: Array, blocks: bool) -> Iterator[Text]:
    from rich.text import Text

    if not blocks:
        for row in shares:
            yield Text("".join(" " if math.isnan(s) else SHADES[round(s * (len(SHADES) - 1))] for s in row))
        return
    for top in range(0, len(shares), 2):
        upper = shares[top]
        lower = shares[top + 1] if top + 1 < len(shares) else np.full_like(upper, np.nan)
        yield Text.assemble(*map(_cell, upper.tolist(), lower.tolist()))


def _cell(upper: float, lower: float) -> tuple[str, str]:
    """Return character and style of two cells, one above the other; NaN is nothing."""
    if math.isnan(upper):
        return (" ", "") if math.isnan(lower) else ("▄", _style(lower))
    return ("▀", _style(upper)) if math.isnan(lower) else ("▀", f"{_style(upper)} on {_style(lower)}")


def _style(share: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour(share))


def _labels(names: list[str], blocks: bool) -> Iterator[str]:
    """Yield what stands beside each line: the name of its first row, on every other line if there are many."""
    most = MOST_LINES * (2 if blocks else 1)
    if len(names) > most:
        edges = np.linspace(0, len(names), most + 1).round().astype(int)[:-1]
        names = [names[edge] for edge in edges]
    lines = names[:: 2 if blocks else 1]
    sparse = 2 if len(lines) > 8 else 1
    yield from (name if number % sparse == 0 else "" for number, name in enumerate(lines))


def histograms(keys: RowStatistics, values: RowStatistics, width: int, height: int = 5) -> Iterator[Text]:
    """Yield how often codes occur, keys and values side by side, -127 on the left."""
    from rich.text import Text

    wide = max(width, NARROWEST) // 2 - 3
    yield Text.assemble(("codes of keys".ljust(wide + 4), "dim"), ("codes of values", "dim"))
    for left, right in zip(bars(keys.code_counts, wide, height), bars(values.code_counts, wide, height), strict=True):
        yield Text.assemble((left, "cyan"), "    ", (right, "cyan"))
    axis = "-127" + "0".center(wide - 8) + "127".rjust(4)
    yield Text(f"{axis}    {axis}", "dim")


def bars(counts: Sequence[int], width: int, height: int) -> Iterator[str]:
    """Yield the lines of a histogram, the top one first."""
    heights = np.add.reduceat(np.asarray(counts, np.float64), _starts(len(counts), width))
    per_column = np.diff([*_starts(len(counts), width), len(counts)])
    heights /= per_column  # columns take a code more or less; what counts is how often each occurs
    top = float(heights.max(initial=0.0)) or 1.0
    steps = EIGHTHS if can_show(EIGHTHS) else " #"
    levels = np.ceil(heights / top * height * (len(steps) - 1)).astype(int)
    for line in reversed(range(height)):
        within = np.clip(levels - line * (len(steps) - 1), 0, len(steps) - 1)
        yield "".join(steps[level] for level in within)


def _starts(count: int, width: int) -> NDArray[np.int64]:
    return np.linspace(0, count, min(width, count) + 1).round().astype(np.int64)[:-1]
