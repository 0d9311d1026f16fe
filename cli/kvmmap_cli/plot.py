"""The pictures as a file: scales as heat maps, codes as histograms, and what int8 costs layer by layer.

The only importer of matplotlib (kvmmap[plot]).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from .output import plain

if TYPE_CHECKING:
    from kvmmap.report import CacheReport, CacheStatistics, ScaleGrid

FORMATS = (".png", ".svg", ".pdf")
KEYS, VALUES = "#26828e", "#b5541c"
INCHES = (11.0, 9.0)


def check(path: str) -> None:
    """Refuse what can't become a picture, before any work is done.

    Raises:
        click.UsageError: another ending, no such directory, or matplotlib is not installed.
    """
    if not path.endswith(FORMATS):
        raise click.UsageError(f"{plain(path)}: a picture ends in {', '.join(FORMATS)}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise click.UsageError(f"{plain(os.path.dirname(path))}: there is no such directory")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'kvmmap[plot]'") from None


def draw(path: str, report: CacheReport, statistics: CacheStatistics, grids: Sequence[ScaleGrid]) -> None:
    """Write the picture; a file that is there is replaced, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    name = os.path.basename(report.path or "in memory")
    figure.suptitle(f"{name}: {report.num_layers} layers, {report.seq_len:,} positions", weight="bold")
    axes = figure.subplots(3, 2)
    for column, part in enumerate(("keys", "values")):
        _heat_map(figure, axes[0][column], part, grids)
        _histogram(axes[1][column], part, getattr(statistics, part).code_counts)
    layers = [layer.index for layer in statistics.layers]
    for axis, title, field, factor in (
        (axes[2][0], "relative error, %", "relative_error", 100),
        (axes[2][1], "crest: largest number / root mean square", "crest", 1),
    ):
        for part, colour in (("keys", KEYS), ("values", VALUES)):
            heights = [factor * getattr(getattr(layer, part), field) for layer in statistics.layers]
            axis.plot(layers, heights, marker="o", markersize=3, color=colour, label=part)
        axis.set(title=title, xlabel="layer", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        figure.savefig(beside, format=path.rpartition(".")[2], dpi=150)
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.unlink(beside)
        raise


def _heat_map(figure: Any, axis: Any, part: str, grids: Sequence[ScaleGrid]) -> None:
    from matplotlib.colors import LogNorm

    rows = [row for grid in grids for row in getattr(grid, part)]
    length = int(grids[0].edges[-1]) if grids else 0
    axis.set(title=f"scales of {part}", xlabel="position", ylabel="layer (and head)")
    if not length:
        return
    cells = np.stack(rows)
    low, high = (float(edge) for edge in np.quantile(cells, [0.01, 0.99]))
    norm = LogNorm(low, max(high, low * 1.01))
    extent = (0, length, len(rows), 0)
    image = axis.imshow(cells, aspect="auto", interpolation="nearest", norm=norm, cmap="viridis", extent=extent)
    starts = np.cumsum([0, *(len(getattr(grid, part)) for grid in grids)])[:-1]
    step = -(-len(grids) // 12)
    axis.set_yticks(starts[::step] + 0.5, [str(grid.layer) for grid in grids[::step]])
    figure.colorbar(image, ax=axis)


def _histogram(axis: Any, part: str, counts: Sequence[int]) -> None:
    codes = np.arange(-127, 128)
    axis.bar(codes, np.asarray(counts) / max(sum(counts), 1) * 100, width=1, color=KEYS if part == "keys" else VALUES)
    axis.set(title=f"codes of {part}", xlabel="code", ylabel="% of codes", xlim=(-129, 129))
