"""The pictures as a file: scales as heat maps, codes as histograms, and what int8 costs layer by layer.

The only importer of matplotlib (kvmmap[plot]).
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from . import outfile
from .output import plain
from .summary import int8_note

if TYPE_CHECKING:
    from kvmmap.report import CacheReport, CacheStatistics, ScaleGrid

FORMATS = (".png", ".svg", ".pdf")
FONT = "DejaVu Sans"
"""The font that comes with matplotlib; what it lacks is shown escaped."""
MOST_TITLE = 90
KEYS, VALUES = "#26828e", "#b5541c"
INCHES = (11.0, 9.0)


def check(path: str, source: str, *, overwrite: bool) -> str:
    """Refuse what can't become a picture, before any work is done; return its path.

    Args:
        path: as the user wrote it.
        source: the cache.
        overwrite: replace a file that is there without asking.

    Raises:
        click.UsageError: another ending, a place that can't be written, or matplotlib is not installed.
    """
    if not path.lower().endswith(FORMATS):
        raise click.UsageError(f"{plain(path)}: a picture ends in {', '.join(FORMATS)}")
    path = outfile.check(path, "--plot", FORMATS, source, overwrite=overwrite)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'kvmmap[plot]'") from None
    return path


def draw(path: str, report: CacheReport, statistics: CacheStatistics, grids: Sequence[ScaleGrid]) -> None:
    """Write the picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A user's own settings must not keep the picture from being drawn (as text.usetex without a LaTeX).
    with rc_context({"text.usetex": False, "font.family": FONT, "axes.unicode_minus": True}):
        figure = Figure(figsize=INCHES, layout="constrained")
        name = _drawable(os.path.basename(report.path or "in memory"))
        about = f"{name}: {report.num_layers} layers, {report.seq_len:,} positions"
        note = int8_note(report, [layer.index for layer in statistics.layers])
        if note is not None:
            about += f"\n{textwrap.fill(note, MOST_TITLE)}"
        figure.suptitle(about, weight="bold", parse_math=False)
        _fill(figure, statistics, grids)
        written = io.BytesIO()
        figure.savefig(written, format=path.lower().rpartition(".")[2], dpi=150)
    outfile.write(path, written.getvalue())


def _drawable(name: str) -> str:
    """Return a name with what the font lacks escaped, and shortened to what fits above a picture."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    shown = "".join(
        c if c.isprintable() and font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in name
    )
    return shown if len(shown) <= MOST_TITLE else f"{shown[: MOST_TITLE // 2]}...{shown[-MOST_TITLE // 2 :]}"


def _fill(figure: Any, statistics: CacheStatistics, grids: Sequence[ScaleGrid]) -> None:
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
