"""`kvmmap diff`: where two caches differ, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ..figures import number, share
from ..output import count, plain, print_json, read, show
from ..progress import no_progress_option, progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvmmap.report import CacheDifference

SAME = 0
DIFFERENT = 1


@click.command("diff")
@click.argument("a", type=click.Path(readable=False))
@click.argument("b", type=click.Path(readable=False))
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON, every layer by itself.")
@no_progress_option
def command(a: str, b: str, as_json: bool, no_progress: bool) -> None:
    """Compare what the caches A and B hold: lengths, token ids, every row, and the states of checkpoints.

    Capacity, storage and commits don't count. Rows of different codecs are compared as the numbers that they stand
    for. Exit code 0: the same. 1: different. 2: usage, they have different
    shapes, or one can't be read.

    \b
    Examples:
      kvmmap diff prompt.kvm copy.kvm
      kvmmap diff --json before.kvm after.kvm | jq .first
    """
    from kvmmap import report

    with progress("comparing", no_progress) as advance:
        found = read(a, lambda one: read(b, lambda other: report.compare(one, other, progress=advance)))
    if as_json:
        print_json(found.to_dict())
    else:
        show(*_render(found, a, b))
    click.get_current_context().exit(SAME if found.same else DIFFERENT)


def _render(found: CacheDifference, a: str, b: str) -> Iterator[RenderableType]:
    from rich.text import Text

    names = Text.assemble((plain(a), "bold"), " and ", (plain(b), "bold"), ": ")
    compared = f"{count(found.compared, 'position')} in {count(len(found.layers), 'layer')}"
    if found.same:
        yield names + Text.assemble(("the same", "green"), f", {compared}")
    else:
        yield names + Text("different", "bold red")
    if found.lengths[0] != found.lengths[1]:
        yield f"lengths: {found.lengths[0]:,} and {found.lengths[1]:,}; the first {found.compared:,} are compared"
    if found.first_token is not None:
        yield f"token ids: differ from position {found.first_token:,} on"
    if not found.same_about:
        yield "model or metadata differ"
    if found.first_checkpoint is not None:
        yield f"states: differ in the checkpoint at position {found.first_checkpoint:,}"
    if found.first is not None:
        yield f"rows: differ from position {found.first:,} on"
        yield _table(found)
    elif not found.same:
        yield f"rows: the same, {compared}"


def _table(found: CacheDifference) -> Table:
    """Make a table of the layers that differ."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("layer", "", "first", "rows that differ", "largest", "mean", "relative"):
        table.add_column(name, justify="left" if not name else "right")
    for layer in found.layers:
        for name, part in (("keys", layer.keys), ("values", layer.values)):
            if part.first is not None:
                table.add_row(
                    str(layer.index),
                    name,
                    f"{part.first:,}",
                    f"{part.different_rows:,} ({share(part.different_rows / part.rows)})",
                    number(part.largest),
                    number(part.mean),
                    share(part.relative),
                )
    return table
