"""`kvmmap verify`: compare a cache with its checksums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..output import DAMAGED, SOUND, count, plain, print_json, read, show, size
from ..progress import no_progress_option, progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvmmap import Damage, VerifyReport


@click.command("verify")
@click.argument("path", type=click.Path(readable=False))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@no_progress_option
def command(path: str, as_json: bool, no_progress: bool) -> None:
    """Check the cache at PATH against its checksums.

    Compares every committed block of keys, values and token ids, and the records that lead to them.

    Exit code 0: no damage. 1: damage was found; layers and positions are printed. 2: usage, or PATH is no cache or
    can't be read. Positions that a writer has not committed yet have no checksum, and are only counted.

    \b
    Examples:
      kvmmap verify prompt.kvm
      kvmmap verify --json prompt.kvm | jq .damages
    """
    with progress("verifying", no_progress) as advance:
        report, num_layers = read(path, lambda cache: (cache.verify(advance), cache.num_layers))
    if as_json:
        print_json(to_dict(report))
    else:
        show(*render(report, path, num_layers))
    click.get_current_context().exit(SOUND if report.sound else DAMAGED)


def to_dict(report: VerifyReport) -> dict[str, Any]:
    """Return a report as plain JSON types."""
    import dataclasses

    plain_types = dataclasses.asdict(report)
    for damage in plain_types["damages"]:
        if damage["parent"] is None:  # of most caches, which continue none
            del damage["parent"]
    unverified = report.seq_len - report.verified
    return plain_types | {"unverified": unverified, "sound": report.sound}


def render(report: VerifyReport, title: str, num_layers: int) -> Iterator[RenderableType]:
    """Yield the lines of the result."""
    from rich.text import Text

    if report.sound:
        yield Text.assemble((plain(title), "bold"), ": ", ("sound", "green"))
    else:
        yield Text.assemble((plain(title), "bold"), ": ", ("damaged", "bold red"))
        yield from (f"  {plain(line)}" for line in _lines(report.damages))
    yield from (f"  {plain(line)}, and the coded ones are used" for line in _lines(report.inexact))
    yield (
        f"checked {count(report.blocks, 'block')}, {size(report.bytes)}: {count(report.verified, 'position')} in "
        f"{count(num_layers, 'layer')}"
    )
    own = [damage for damage in report.damages if damage.parent is None]
    if own and report.path is not None and report.path.endswith(".kvm"):
        yield "kvmmap repair PATH NEW_PATH saves what is sound in a new file"
    unverified = report.seq_len - report.verified
    if unverified:
        yield f"not checked: {count(unverified, 'position')} not yet committed, [{report.verified}, {report.seq_len})"


def _lines(damages: list[Damage]) -> Iterator[str]:
    """Yield the damage; adjacent blocks of a layer with the same damage share a line."""
    runs: dict[tuple[int | None, str], list[list[int]]] = {}
    for damage in damages:
        if damage.start is None or damage.stop is None:
            yield damage.what
            continue
        place = "token ids" if damage.layer is None else f"layer {damage.layer}"
        place = place if damage.parent is None else f"{damage.parent}: {place}"
        trouble = f"{place}, positions [{{}}, {{}}): {damage.what.rpartition(': ')[2]}"
        found = runs.setdefault((damage.layer, trouble), [])
        if found and found[-1][1] == damage.start:
            found[-1][1] = damage.stop
        else:
            found.append([damage.start, damage.stop])
    for (_, trouble), ranges in sorted(runs.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0)):
        yield from (trouble.format(start, stop) for start, stop in ranges)
