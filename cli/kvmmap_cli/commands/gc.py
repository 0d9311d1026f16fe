"""`kvmmap gc`: remove caches that are old, or too many."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from ..asking import confirm, yes_option
from ..listing import look
from ..output import SOUND, USAGE, count, failure, plain, show, size
from ..paths import walk
from ..units import parse_age, parse_size

if TYPE_CHECKING:
    from rich.table import Table

SURELY_DEAD = 24 * 3600.0
"""Seconds after which a temporary file goes: its creator is dead, or the copy is unlikely to be continued."""


@dataclass(frozen=True, slots=True)
class Found:
    """A candidate for removal."""

    paths: tuple[str, ...]
    """All of its names in the folder: more than one if it has hard links."""
    used: float
    """When it was last used, in seconds since 1970: its access time, or that of its last write."""
    bytes: int
    """Bytes on the disk."""
    parents: tuple[str, ...] = ()
    """The files that it continues: none of them goes before it."""


@click.command("gc")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--max-bytes", type=parse_size, metavar="SIZE", help="Keep at most so many bytes: 500M, 10GiB.")
@click.option("--older-than", type=parse_age, metavar="AGE", help="Remove caches not used for this long: 12h, 30d, 2w.")
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
@yes_option
def command(folder: str, max_bytes: int | None, older_than: float | None, dry_run: bool, yes: bool) -> None:
    """Remove the least recently used .kvm caches in DIR and below.

    A cache was last used when a program read or attended over its rows, or appended; looking at it (inspect, verify,
    report, copy, gc) is no use. One that a writer holds is never removed, and neither is a file that is no cache. A
    cache that others continue stays as long as one of them does.
    Temporary files of killed processes are removed once they are a day old. Asks first.

    \b
    Examples:
      kvmmap gc caches/ --older-than 30d --dry-run
      kvmmap gc caches/ --max-bytes 50GiB --yes
    """
    if max_bytes is None and older_than is None:
        raise click.UsageError("give a limit: --max-bytes, --older-than, or both")
    unreadable: list[OSError] = []
    caches, kept = _caches(folder, unreadable.append)
    for error in unreadable:
        click.echo(f"kvmmap: {failure(error)[1]}", err=True)
    left_out = USAGE if unreadable else SOUND
    going = _choose(caches, max_bytes, older_than, sum(found.bytes for found in kept))
    left = list(_left_over(folder))
    if not going and not left:
        click.echo(f"nothing to remove: {count(len(caches) + len(kept), 'cache')}, {size(_sum(caches) + _sum(kept))}")
        click.get_current_context().exit(left_out)
    show(_table([*going, *left]))
    what = f"{count(len(going), 'cache')}" + (f" and {count(len(left), 'left-over file')}" if left else "")
    if dry_run:
        click.echo(f"would remove {what}, {size(_sum(going) + _sum(left))}")
        click.get_current_context().exit(left_out)
    confirm(f"Remove {what}, {size(_sum(going) + _sum(left))}?", yes)
    click.get_current_context().exit(_remove(going, left) or left_out)


def _caches(folder: str, on_error: Callable[[OSError], None]) -> tuple[list[Found], list[Found]]:
    """Return the caches that may be removed, least recently used first, and those that a writer has open."""
    free: list[Found] = []
    held: list[Found] = []
    for found in _files(path for path in walk(folder, on_error) if path.endswith(".kvm") and not os.path.islink(path)):
        path = found.paths[0]
        entry = look(path)
        if entry.report is None or entry.report.commit is None:
            click.echo(f"kvmmap: {plain(path)}: left alone: {entry.error}", err=True)
        else:
            parents = tuple(parent.path for parent in entry.report.parents)
            found = replace(found, parents=parents)
            (held if entry.report.commit.state == "open for writing" else free).append(found)
    return _children_first(free, held)


def _children_first(free: Sequence[Found], held: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """Sort caches so that each comes after those that continue it; what one that is held continues is held, too."""
    used: dict[str, float] = {}
    for found in free:
        for path in found.parents:
            used[path] = max(used.get(path, found.used), found.used)
    needed = {path for found in held for path in found.parents}
    names = {found: [os.path.realpath(path) for path in found.paths] for found in free}
    kept = [found for found in free if needed.intersection(names[found])]
    rest = [found for found in free if not needed.intersection(names[found])]
    rest = [replace(found, used=max([found.used, *(used.get(name, 0.0) for name in names[found])])) for found in rest]
    return sorted(rest, key=lambda found: (found.used, -len(found.parents))), [*held, *kept]


def _files(paths: Iterable[str]) -> list[Found]:
    """Return files, hard links once; those removed meanwhile are left out."""
    names: dict[tuple[int, int], list[str]] = {}
    facts: dict[tuple[int, int], os.stat_result] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            names.setdefault((status.st_dev, status.st_ino), []).append(path)
            facts[status.st_dev, status.st_ino] = status
    return [
        Found(tuple(names[file]), max(status.st_atime, status.st_mtime), status.st_blocks * 512)
        for file, status in facts.items()
    ]


def _choose(caches: Sequence[Found], max_bytes: int | None, older_than: float | None, held: int) -> list[Found]:
    """Return what to remove: all that is too old, then the least recently used until the rest fits."""
    oldest = -1.0 if older_than is None else time.time() - older_than
    going = [found for found in caches if found.used < oldest]
    rest = [found for found in caches if found.used >= oldest]
    total = held + _sum(rest)
    while max_bytes is not None and total > max_bytes and rest:
        going.append(rest.pop(0))
        total -= going[-1].bytes
    return going


def _left_over(folder: str) -> Iterator[Found]:
    import kvmmap

    yield from (found for found in _files(kvmmap.find_temporary(folder)) if time.time() - found.used > SURELY_DEAD)


def _sum(found: Sequence[Found]) -> int:
    return sum(file.bytes for file in found)


def _table(files: Sequence[Found]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("to remove", overflow="fold")
    table.add_column("on disk", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for file in files:
        for number, path in enumerate(file.paths):
            what = "the same file" if number else size(file.bytes)
            table.add_row(plain(path), what, "" if number else _when(file.used))
    return table


def _when(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # out of the calendar's range
        return "?"


def _remove(going: Sequence[Found], left: Sequence[Found]) -> int:
    """Remove files and print a summary; report those that can't be removed, and continue."""
    import kvmmap

    gone, code = [], SOUND
    needed: set[str] = set()  # what caches continue that could not be removed
    for file in [*going, *left]:
        if not needed.intersection(map(os.path.realpath, file.paths)):
            try:
                if _remove_one(file, temporary=file in left):
                    gone.append(file)
                    continue
            except (kvmmap.CacheNotFoundError, FileNotFoundError):
                continue  # removed by another process meanwhile
            except kvmmap.CacheLockedError:
                click.echo(f"kvmmap: {plain(file.paths[0])}: left alone: a writer has opened it", err=True)
            except (kvmmap.KvmmapError, OSError) as error:
                click.echo(f"kvmmap: {failure(error)[1]}", err=True)
                code = USAGE
        needed.update(file.parents)
    click.echo(f"removed {count(len(gone), 'file')}, {size(_sum(gone))}")
    return code


def _remove_one(file: Found, *, temporary: bool) -> bool:
    """Remove a file under all of its names; False if it is in use."""
    import kvmmap

    for path in file.paths:
        if not temporary:
            kvmmap.remove(path)
        elif not kvmmap.remove_temporary(path, older_than=SURELY_DEAD):
            return False
    return True
