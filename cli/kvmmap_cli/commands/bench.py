"""`kvmmap bench`: measure kvmmap on this machine, beside memcpy."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import click

from ..output import print_json, show
from ..progress import no_progress_option
from ..units import Seconds

if TYPE_CHECKING:
    from rich.table import Table

    from ..measuring import Figure

MOST_NUMBERS = 2**32
"""Of keys and of values each: 16 GiB of f32."""

FOLDER = click.Path(exists=True, file_okay=False)


@click.command("bench")
@click.option(
    "--dir", "folder", metavar="DIR", type=FOLDER, help="Where to put files; the temporary directory by default."
)
@click.option(
    "--seconds", type=Seconds(1, 600), default=20.0, show_default=True, metavar="SECONDS", help="About how long."
)
@click.option("--kv-heads", type=click.IntRange(1, 65_535), default=8, show_default=True, help="Key and value heads.")
@click.option("--head-dim", type=click.IntRange(1, 65_535), default=128, show_default=True, help="Numbers in a row.")
@click.option(
    "--tokens", type=click.IntRange(256, 2**24), default=16384, show_default=True, help="Positions of the layer."
)
@click.option("--json", "as_json", is_flag=True, help="Print all rounds as JSON.")
@no_progress_option
def command(
    folder: str | None, seconds: float, kv_heads: int, head_dim: int, tokens: int, as_json: bool, no_progress: bool
) -> None:
    """Measure the speed of kvmmap on this machine, beside memcpy of the same rows.

    One thread; each figure is the median of rounds that take turns with memcpy, in one process: on a machine that does
    other things too, only the ratios are worth anything. Files go to DIR, and are removed.

    \b
    Examples:
      kvmmap bench
      kvmmap bench --dir /mnt/nvme --seconds 50 --json > bench.json
    """
    from ..measuring import measure

    if tokens * kv_heads * head_dim > MOST_NUMBERS:
        raise click.UsageError("--tokens x --kv-heads x --head-dim is more than this measures: lower one of them")
    with tempfile.TemporaryDirectory(prefix="kvmmap-bench-", dir=folder) as place:
        figures = measure(place, seconds, tokens, kv_heads, head_dim, no_progress=no_progress)
    import kvmmap

    facts = {"version": kvmmap.__version__, "kernel": kvmmap.kernel(), "shape": [tokens, kv_heads, head_dim]}
    if as_json:
        print_json(facts | {"figures": [figure.to_dict() for figure in figures]})
        return
    click.echo(f"{facts['kernel']} kernel, one thread, {tokens:,} positions of {kv_heads} KV heads x {head_dim}")
    show(_table(figures))


def _table(figures: list[Figure]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in ("speed", "x memcpy", "range", "rounds"):
        table.add_column(name, justify="right", no_wrap=True)
    for figure in figures:
        low, high = figure.range
        table.add_row(
            figure.name,
            figure.speed,
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            "" if figure.ratio is None else f"{low:.2f}-{high:.2f}",
            str(len(figure.seconds)),
        )
    return table
