"""Statistics as tables: what int8 costs in each layer, and what stands out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .output import count

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvmmap.report import CacheStatistics, LayerStatistics, RowStatistics

MOST_OUTLIERS = 5
WIDE_ENOUGH = 112
"""Columns from which on there is room for all figures of a layer."""

Figure = tuple[str, Callable[["RowStatistics"], str], bool]


def number(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:#.3g}".rstrip(".") if value else "0"


def share(value: float) -> str:
    """Return a share as per cent; it looks like none only if it is."""
    if 0 < value < 1e-4:
        return "< 0.01 %"
    return f"{value * 100:.{2 if value < 0.1 else 1}f} %"


# Heading, how it is shown, and whether it is shown where there is little room.
FIGURES: tuple[Figure, ...] = (
    ("scale", lambda rows: "-" if rows.scales is None else number(rows.scales.median), True),
    ("crest", lambda rows: f"{rows.crest:.2f}", True),
    ("outliers", lambda rows: share(rows.outlier_ratio), True),
    ("zero rows", lambda rows: f"{rows.zero_rows:,}", False),
    ("saturated", lambda rows: share(rows.saturation), False),
    ("bits", lambda rows: f"{rows.entropy:.2f}", True),
    ("error", lambda rows: share(rows.relative_error), True),
    ("bound", lambda rows: number(rows.error_bound), False),
)


def table(layers: tuple[LayerStatistics, ...], width: int) -> Table:
    """Make a row a layer, keys and values side by side."""
    from rich.table import Table

    shown = [figure for figure in FIGURES if figure[2] or width >= WIDE_ENOUGH]
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", show_footer=False)
    grid.add_column("layer", justify="right")
    for part in ("keys", "values"):
        for position, (name, _, _) in enumerate(shown):
            grid.add_column(f"{'' if position else part}\n{name}", justify="right", no_wrap=True)
        if part == "keys":
            grid.add_column("", width=1)
    for layer in layers:
        keys, values = ([show(rows) for _, show, _ in shown] for rows in (layer.keys, layer.values))
        grid.add_row(str(layer.index), *keys, "", *values)
    return grid


def summary(statistics: CacheStatistics) -> Table:
    """Make a table of all figures, keys beside values, with what they mean."""
    from rich.table import Table

    keys, values = statistics.keys, statistics.values
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column("")
    grid.add_column("keys", justify="right")
    grid.add_column("values", justify="right")
    grid.add_column("", style="dim", overflow="fold")

    def add(name: str, show: Callable[[RowStatistics], str], about: str = "") -> None:
        grid.add_row(name, show(keys), show(values), about)

    add("rows", lambda rows: f"{rows.rows:,}", "positions times heads")
    add("zero rows", lambda rows: f"{rows.zero_rows:,}")
    for name, about in (
        ("smallest", ""),
        ("p01", ""),
        ("median", "half of the rows have a smaller scale"),
        ("p99", ""),
        ("largest", ""),
    ):
        add(f"scale, {name}", lambda rows, name=name: _scale(rows, name), about)  # type: ignore[misc]
    add("crest", lambda rows: f"{rows.crest:.2f}", "largest number / root mean square, the rows' mean")
    add("outlier rows", lambda rows: share(rows.outlier_ratio), "crest over 5: few codes left for the rest")
    add("saturation", lambda rows: share(rows.saturation), "codes of -127 or 127; each row has one")
    add("entropy", lambda rows: f"{rows.entropy:.2f} bits", "of 8 that a code takes")
    add("error bound", lambda rows: number(rows.error_bound), "no number is off by more")
    add("error, rms", lambda rows: number(rows.rms_error), "estimated")
    add("error, relative", lambda rows: share(rows.relative_error), "to the numbers' root mean square")
    return grid


def _scale(rows: RowStatistics, name: str) -> str:
    return "-" if rows.scales is None else number(getattr(rows.scales, name))


def outliers(statistics: CacheStatistics) -> Iterator[RenderableType]:
    """Yield a line for each kind of outlier that there is."""
    from rich.text import Text

    found = statistics.outliers
    for name, channels in (("key", found.key_channels), ("value", found.value_channels)):
        if channels:
            told = [f"{o.ratio:.1f}x layer {o.layer} head {o.head} [{o.channel}]" for o in channels]
            yield Text.assemble((f"{name} channels that stand out: ", "dim"), _few(told))
    for name, positions in (("key", found.key_positions), ("value", found.value_positions)):
        if positions:
            told = [f"{o.ratio:.1f}x position {o.position:,} in layer {o.layer} head {o.head}" for o in positions]
            yield Text.assemble((f"{name} rows that stand out: ", "dim"), _few(told))


def _few(told: list[str]) -> str:
    more = f"; {count(len(told) - MOST_OUTLIERS)} more in --json" if len(told) > MOST_OUTLIERS else ""
    return ", ".join(told[:MOST_OUTLIERS]) + more
