"""`kvmmap library pin`, `gc`, `verify` and `rebuild`: looking after a library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ..asking import confirm, yes_option
from ..output import DAMAGED, SOUND, count, plain, print_json, size
from ..units import parse_age, parse_size
from .shared import folder_argument, json_option, opened, shorten, to_dict

if TYPE_CHECKING:
    from kvmmap.library import CheckReport, Choice


@click.command("pin")
@folder_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--remove", is_flag=True, help="Unpin instead.")
def pin(folder: str, names: Sequence[str], remove: bool) -> None:
    """Keep segments of the library in DIR whatever its budget, with those that they continue.

    \b
    Examples:
      kvmmap library pin caches/ 1f6bc6f1
      kvmmap library pin --remove caches/ 1f6bc6f1
    """
    with opened(folder) as library:
        found = [library.entry(name) for name in names]
        (library.unpin if remove else library.pin)(*(segment.name for segment in found))
    click.echo(f"{'unpinned' if remove else 'pinned'} {count(len(found), 'segment')}")


@click.command("gc")
@folder_argument
@click.option(
    "--max-bytes", type=parse_size, metavar="SIZE", help="Keep at most so much; the library's own by default."
)
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why.")
@click.option("--remote", is_flag=True, help="In its object store instead; needs --max-bytes or --older-than.")
@click.option("--older-than", type=parse_age, metavar="AGE", help="With --remote: remove what was stored so long ago.")
@json_option
@yes_option
def gc(
    folder: str,
    max_bytes: int | None,
    dry_run: bool,
    remote: bool,
    older_than: float | None,
    as_json: bool,
    yes: bool,
) -> None:
    """Remove what has expired from the library in DIR, and then what is worth least, until it is within its budget.

    A segment is worth the computation that it saves, for its size and its uses, and less the longer it was not used.
    One that another continues, that is pinned, or that a session writes, stays. Asks first.

    \b
    Examples:
      kvmmap library gc caches/ --dry-run --max-bytes 10GiB
      kvmmap library gc caches/ --max-bytes 10GiB --yes
      kvmmap library gc caches/ --remote --older-than 30d
    """
    if remote:
        _gc_remote(folder, max_bytes, older_than, dry_run or as_json, yes)
        return
    if older_than is not None:
        raise click.UsageError("--older-than is for --remote; `library.ttl` keeps segments for a time")
    with opened(folder) as library:
        going = library.evict(max_bytes, dry_run=True)
        if going and not dry_run:
            if not as_json:
                _tell(going, "to remove")
            confirm(f"Remove {count(len(going), 'segment')}, {size(_sum(going))}?", yes)
            going = library.evict(max_bytes)
    if as_json:
        print_json([to_dict(choice) | {"segment": to_dict(choice.segment)} for choice in going])
        return
    if dry_run:
        _tell(going, "would go")
    what = f"{count(len(going), 'segment')}, {size(_sum(going))}"
    click.echo("nothing to remove" if not going else f"{'would remove' if dry_run else 'removed'} {what}")


def _gc_remote(folder: str, max_bytes: int | None, older_than: float | None, unknown: bool, yes: bool) -> None:
    """Clean up the object store."""
    if unknown:
        raise click.UsageError("--remote takes neither --dry-run nor --json")
    if max_bytes is None and older_than is None:
        raise click.UsageError("say what is too much: --max-bytes, --older-than, or both")
    confirm("Remove segments from the object store, for all machines?", yes)
    with opened(folder) as library:
        report = library.clean_up(max_bytes=max_bytes, older_than=older_than)
    click.echo(
        f"removed {count(len(report.segments), 'segment')}, {size(report.bytes)}, and "
        f"{count(report.orphans, 'object')} of interrupted pushes; compacted {count(report.manifests, 'manifest')}"
    )


def _sum(going: Sequence[Choice]) -> int:
    return sum(choice.segment.bytes for choice in going)


def _tell(going: Sequence[Choice], what: str) -> None:
    for choice in going:
        click.echo(f"{what}: {plain(choice.explanation)}")


@click.command("verify")
@folder_argument
@json_option
def verify(folder: str, as_json: bool) -> None:
    """Compare every segment of the library in DIR with its checksums.

    A damaged segment is not matched any more, and goes first when room is needed. Exit code 1: there is one.

    \b
    Example:
      kvmmap library verify caches/
    """
    with opened(folder) as library:
        reports = library.verify()
        broken = [entry for entry in library.entries() if entry.broken]
    if as_json:
        print_json(
            {"verified": [to_dict(report) for report in reports], "broken": [to_dict(entry) for entry in broken]}
        )
    else:
        for entry in broken:
            click.echo(f"{plain(entry.path)}: {plain(entry.broken or '')}")
        checked = f"{count(len(reports), 'segment')}, {size(sum(report.bytes for report in reports))}"
        click.echo(f"checked {checked}; {len(broken)} of no use")
    click.get_current_context().exit(DAMAGED if broken else SOUND)


@click.command("rebuild")
@folder_argument
@click.option("--quick", is_flag=True, help="Only bring the index in line with the files.")
@json_option
def rebuild(folder: str, quick: bool, as_json: bool) -> None:
    """Make the index of the library in DIR anew from its segments.

    This happens by itself if the index is lost. Times of last use become those of the last writing.

    \b
    Examples:
      kvmmap library rebuild caches/
      kvmmap library rebuild --quick caches/
    """
    with opened(folder) as library:
        report = library.check() if quick else library.rebuild()
    if as_json:
        print_json(to_dict(report))
        return
    for line in _lines(report):
        click.echo(line)


def _lines(report: CheckReport) -> list[str]:
    found = [f"{count(report.segments, 'segment')}, {size(report.bytes)} on disk"]
    for what, names in (
        ("added", report.added),
        ("brought up to date", report.updated),
        ("gone", report.removed),
        ("of no use", report.broken),
        ("being written", report.busy),
    ):
        if names:
            shown = ", ".join(shorten(name) for name in names[:10])
            found.append(f"{what}: {count(len(names), 'segment')} ({shown}{', ...' if len(names) > 10 else ''})")
    return found


COMMANDS = (pin, gc, verify, rebuild)
