"""`kvmmap repair`: recover the undamaged part of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..asking import confirm_ending, yes_option
from ..output import INDEX, count, plain, print_json
from ..progress import no_progress_option, progress

if TYPE_CHECKING:
    from kvmmap import RepairReport

METADATA = {"earlier": "model and metadata are those of the commit before", "lost": "model and metadata are lost"}


class Place(click.ParamType):  # type: ignore[type-arg]
    """LAYER:BLOCK, or tokens:BLOCK."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, int]:
        layer, _, block = str(value).partition(":")
        if not INDEX.fullmatch(block) or not (layer == "tokens" or INDEX.fullmatch(layer)):
            self.fail(f"{plain(str(value)[:80])} is neither LAYER:BLOCK, such as 3:7, nor tokens:BLOCK", param, ctx)
        return (None if layer == "tokens" else int(layer), int(block))


@click.command("repair")
@click.argument("path", type=click.Path(readable=False))
@click.argument("new_path", type=click.Path(readable=False))
@click.option(
    "--zero",
    type=Place(),
    multiple=True,
    metavar="LAYER:BLOCK",
    help="Replace this block by zeros if it is damaged, and keep what follows; may be repeated. "
    "tokens:BLOCK for token ids, which become -1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@yes_option
@no_progress_option
def command(
    path: str, new_path: str, zero: tuple[tuple[int | None, int], ...], as_json: bool, yes: bool, no_progress: bool
) -> None:
    """Recover the undamaged part of the cache at PATH into a new cache at NEW_PATH.

    Keeps positions from the first on, up to the first block (256 positions) that does not match its checksum in some
    layer: with a hole in the middle, later positions would mean something else. Says what it kept. PATH is only read,
    and no writer may have it open; nothing may be at NEW_PATH.

    With --zero a damaged block is zeros in the new cache, and nothing is cut. Attention gives zeros a weight like any
    other rows, so their positions should be left out; the metadata's "kvmmap.repair" lists them.

    Exit code 1: nothing can be saved, as where the superblock is damaged.

    \b
    Examples:
      kvmmap repair prompt.kvm saved.kvm
      kvmmap repair --zero 3:7 prompt.kvm saved.kvm
    """
    import kvmmap

    confirm_ending(new_path, yes, (".kvm",))
    with progress("saving", no_progress) as advance:
        report = kvmmap.repair(path, new_path, zero=zero, progress=advance)
    if as_json:
        print_json(to_dict(report))
        return
    for line in render(report):
        click.echo(line)


def to_dict(report: RepairReport) -> dict[str, Any]:
    """Return a report as plain JSON types."""
    import dataclasses

    return dataclasses.asdict(report) | {"complete": report.complete}


def render(report: RepairReport) -> Iterator[str]:
    """Yield the lines of the result."""
    yield from (f"damaged: {plain(damage.what)}" for damage in report.damages)
    kept = "all" if report.seq_len == report.stored else f"[0, {report.seq_len:,})"
    yield f"{plain(report.new_path)}: {kept} of {count(report.stored, 'position')} kept"
    yield from (f"zeros now: {plain(place.what.partition(':')[0])}" for place in report.zeroed)
    if report.unverified:
        yield f"the last {count(report.unverified, 'position')} were never committed, and had no checksum"
    if report.token_len < min(report.stored_token_len, report.seq_len):
        yield f"token ids: of the first {count(report.token_len, 'position')} alone"
    if report.metadata in METADATA:
        yield METADATA[report.metadata]
